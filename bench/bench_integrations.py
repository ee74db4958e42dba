"""Ten steps of other packages' optimizers, with these kernels in them and without.

Random gradients, another one in every step, on the matrices and vectors of a small GPT; roots and
bases are computed anew once in the ten. The errors are of the way that the parameters went in the
first ten steps, against the peer's own formula in float64: for DASH with its iteration run to the
end, for Muon with the same polynomial. HeavyBall runs without torch.compile. Muon multiplies in
bfloat16: where the CPU does that itself, ours in float32 is slower.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import QUICK
from torch import nn

from shampoo_kernels import integrations, orthogonal_iteration
from shampoo_kernels.integrations._patching import UnsupportedPeer

CYCLE = 10
WIDTH = 96 if QUICK else 256
MATRICES = [
    (256, WIDTH),
    (3 * WIDTH, WIDTH),
    (WIDTH, WIDTH),
    (4 * WIDTH, WIDTH),
    (WIDTH, 4 * WIDTH),
]
VECTORS = [(WIDTH,), (4 * WIDTH,)]


class Peer(NamedTuple):
    module: str  # of shampoo_kernels.integrations, and of the peer unless it is torch
    make: Callable  # make(package, parameters)
    exact: dict = {}  # noqa: RUF012 - options of the float64 run that errors are measured against


def _named(name: str, package, parameters, **options):
    return getattr(package, name)(parameters, **options)


def _row(module: str, name: str, exact: dict | None = None, **options) -> Peer:
    return Peer(module, functools.partial(_named, name, **options), exact or {})


_SCALABLE = {"start_preconditioning_step": 1, "preconditioning_compute_steps": CYCLE}
_FLOAT64 = {"storage_dtype": "float64"}
PEERS = {
    "pytorch_optimizer DASH": _row(
        "pytorch_optimizer", "DASH", {"newton_steps": 60}, precondition_frequency=CYCLE
    ),
    "pytorch_optimizer DASH, eigh": _row(
        "pytorch_optimizer", "DASH", precondition_frequency=CYCLE, inverse_root_method="eigh"
    ),
    "pytorch_optimizer ScalableShampoo": _row("pytorch_optimizer", "ScalableShampoo", **_SCALABLE),
    "pytorch_optimizer Shampoo": _row(
        "pytorch_optimizer", "Shampoo", preconditioning_compute_steps=CYCLE
    ),
    "pytorch_optimizer SOAP": _row("pytorch_optimizer", "SOAP", precondition_frequency=CYCLE),
    "torch_optimizer Shampoo": _row("torch_optimizer", "Shampoo", update_freq=CYCLE),
    "HeavyBall SOAP": _row("heavyball", "SOAP", _FLOAT64, precondition_frequency=CYCLE),
    "HeavyBall KLSOAP": _row("heavyball", "KLSOAP", _FLOAT64, precondition_frequency=CYCLE),
    "HeavyBall KLShampoo": _row("heavyball", "KLShampoo", _FLOAT64, precondition_frequency=CYCLE),
    "torch.optim.Muon": Peer("muon", functools.partial(_named, "Muon")),
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

    def __init__(self, make, package, shapes, within, dtype=torch.float32, **options):
        torch.manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(s).to(dtype)) for s in shapes]
        self.grads = [[torch.randn(s).to(dtype) for s in shapes] for _ in range(CYCLE)]
        self.optimizer = make(package, self.parameters, **options)
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


@pytest.mark.parametrize("name", PEERS)
def bench_integrations(versus, name):
    peer = PEERS[name]
    integration, package = package_of(peer.module)
    shapes = MATRICES if peer.module == "muon" else MATRICES + VECTORS
    start = functools.partial(Run, peer.make, package, shapes)
    alone, ours = start(contextlib.nullcontext), start(integration.enable)
    exactly = integration.enable if peer.module == "muon" else contextlib.nullcontext
    truth = start(exactly, dtype=torch.float64, **peer.exact).way()
    errors = {
        which: (run.way() - truth).norm() / truth.norm()
        for which, run in (("ours", ours), ("the peer alone", alone))
    }
    case = f"{name}, {CYCLE} steps"
    versus(ours, {"the peer alone": alone}, case=case, errors=errors)


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
