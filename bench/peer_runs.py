"""Other packages' optimizers on the matrices and vectors of a small GPT."""

import os
from typing import NamedTuple

import torch
from torch import nn

from shampoo_kernels import integrations

CYCLE = 10
WIDTH = 96 if os.environ.get("QUICK") == "1" else 160
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

    def run(self, package, within, dtype=torch.float32, device="cpu", **more) -> "Run":
        def make(parameters):
            return getattr(package, self.name)(parameters, **self.options, **more)

        shapes = MATRICES if self.module == "muon" else MATRICES + VECTORS
        return Run(make, shapes, within, dtype, device)


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
    """(the integration, the peer's package); UnsupportedPeer where it is not here."""
    __import__(f"{integrations.__name__}.{module}")
    integration = getattr(integrations, module)
    integration.enable().disable()
    package = torch.optim if module == "muon" else __import__(module)
    if module == "heavyball":
        package.utils.compile_mode = None
    return integration, package


class Run:
    """make(parameters), an optimizer of its own that takes CYCLE steps at every call."""

    def __init__(self, make, shapes, within, dtype=torch.float32, device="cpu"):
        torch.manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(s).to(device, dtype)) for s in shapes]
        self.grads = [[torch.randn(s).to(device, dtype) for s in shapes] for _ in range(CYCLE)]
        self.optimizer, self.within = make(self.parameters), within

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
