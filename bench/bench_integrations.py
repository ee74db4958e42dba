"""Ten steps of other packages' optimizers, with these kernels in them and without.

Random gradients, another one in every step, on the matrices and vectors of a small GPT; roots and
bases are computed anew once in the ten. The errors are of the way that the parameters went in the
first ten steps, against the peer's own formula in float64: for DASH, ScalableShampoo and Muon,
which stop short of theirs, with ours in them, which the tests hold to it. SOAP's begin with
eigenvectors that rounding decides, with ours or without. HeavyBall runs without torch.compile. Muon
multiplies in bfloat16: where the CPU does that itself, ours in float32 is slower.
"""

import contextlib
import functools
from typing import NamedTuple

import pytest
import torch
from conftest import QUICK
from torch import nn

from shampoo_kernels import integrations, orthogonal_iteration
from shampoo_kernels.integrations._patching import UnsupportedPeer

CYCLE = 10
WIDTH = 96 if QUICK else 160
MATRICES = [
    (256, WIDTH), (3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH),
]  # fmt: skip
VECTORS = [(WIDTH,), (4 * WIDTH,)]


class Peer(NamedTuple):
    module: str  # of shampoo_kernels.integrations, and of the peer unless it is torch
    name: str
    options: dict
    exact: dict = {}  # more options of the float64 run that errors are measured against
    inexact: bool = False  # in float64 too, so that the run with ours in it is the exact one


EVERY = {"precondition_frequency": CYCLE}
SCALABLE = {"start_preconditioning_step": 1, "preconditioning_compute_steps": CYCLE}
FLOAT64 = {"storage_dtype": "float64"}
PEERS = {
    "pytorch_optimizer DASH": Peer("pytorch_optimizer", "DASH", EVERY, inexact=True),
    "the same by eigh": Peer("pytorch_optimizer", "DASH", EVERY | {"inverse_root_method": "eigh"}),
    "pytorch_optimizer ScalableShampoo": Peer(
        "pytorch_optimizer", "ScalableShampoo", SCALABLE, inexact=True
    ),
    "pytorch_optimizer Shampoo": Peer(
        "pytorch_optimizer", "Shampoo", {"preconditioning_compute_steps": CYCLE}
    ),
    "pytorch_optimizer SOAP": Peer("pytorch_optimizer", "SOAP", EVERY),
    "torch_optimizer Shampoo": Peer("torch_optimizer", "Shampoo", {"update_freq": CYCLE}),
    "HeavyBall SOAP": Peer("heavyball", "SOAP", EVERY, FLOAT64),
    "HeavyBall KLSOAP": Peer("heavyball", "KLSOAP", EVERY, FLOAT64),
    "HeavyBall KLShampoo": Peer("heavyball", "KLShampoo", EVERY, FLOAT64),
    "torch.optim.Muon": Peer("muon", "Muon", {}, inexact=True),
}


def package_of(module: str):
    """(the integration, the peer's package), or a skip that says what is missing."""
    __import__(f"{integrations.__name__}.{module}")
    integration = getattr(integrations, module)
    try:
        integration.enable().disable()
    except UnsupportedPeer as error:
        pytest.skip(str(error))
    package = torch.optim if module == "muon" else __import__(module)
    if module == "heavyball":
        package.utils.compile_mode = None
    return integration, package


class Run:
    """An optimizer of its own that takes CYCLE steps at every call."""

    def __init__(self, peer, package, within, dtype=torch.float32, **more):
        shapes = MATRICES if peer.module == "muon" else MATRICES + VECTORS
        torch.manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(s).to(dtype)) for s in shapes]
        self.grads = [[torch.randn(s).to(dtype) for s in shapes] for _ in range(CYCLE)]
        self.optimizer = getattr(package, peer.name)(self.parameters, **peer.options, **more)
        self.within = within

    def __call__(self):
        with self.within():
            for grads in self.grads:
                for parameter, grad in zip(self.parameters, grads, strict=True):
                    parameter.grad = grad.clone()
                self.optimizer.step()

    def way(self) -> torch.Tensor:
        """How the parameters moved in one call."""
        before = [p.detach().double().clone() for p in self.parameters]
        self()
        moved = [p.detach().double() - b for p, b in zip(self.parameters, before, strict=True)]
        return torch.cat([x.flatten() for x in moved])


@pytest.mark.parametrize("name", list(PEERS)[::3] if QUICK else PEERS)
def bench_integrations(versus, name):
    peer = PEERS[name]
    integration, package = package_of(peer.module)
    start = functools.partial(Run, peer, package)
    alone, ours = start(contextlib.nullcontext), start(integration.enable)
    exactly = integration.enable if peer.inexact else contextlib.nullcontext
    truth = start(exactly, dtype=torch.float64, **peer.exact).way()
    errors = {
        which: (run.way() - truth).norm() / truth.norm()
        for which, run in (("ours", ours), ("the peer alone", alone))
    }
    case = f"{name}, {CYCLE} steps"
    # Runs in float32 part from their float64 with ours or without: rounding decides SOAP's bases.
    versus(ours, {"the peer alone": alone}, case=case, errors=errors, accepted=1.0)


@pytest.mark.parametrize("n", [96] if QUICK else [128, 512])
def bench_qr_step(versus, n):
    """HeavyBall's QR step, which the integration leaves as it is, by `orthogonal_iteration`."""
    _, package = package_of("heavyball")
    grads = torch.randn(4, n, 2 * n)
    A = grads @ grads.mT / n
    Q = torch.linalg.qr(torch.randn(4, n, n)).Q
    bases = [Q.clone()]
    versus(
        lambda: orthogonal_iteration(A, Q),
        {"the peer alone": lambda: package.utils.get_orthogonal_matrix_QR([A], bases)},
        case=f"HeavyBall's QR step, 4 of {n}: not switched on",
    )
