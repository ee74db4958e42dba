"""What the tests of integrations.distributed_shampoo share: the peer from its checkout, its configs
and optimizers of them."""

import contextlib
import dataclasses

import pytest
import torch
from checkouts import checkout
from peers import check_agreement

checkout("distributed_shampoo")
peer = pytest.importorskip("distributed_shampoo")

from distributed_shampoo.preconditioner import matrix_functions  # noqa: E402
from distributed_shampoo.preconditioner import matrix_functions_types as types  # noqa: E402
from distributed_shampoo.preconditioner import shampoo_preconditioner_list as lists  # noqa: E402

from shampoo_kernels.integrations import distributed_shampoo as ours  # noqa: E402

__all__ = ["lists", "matrix_functions", "ours", "peer", "types"]

PLAIN = peer.RootInvShampooPreconditionerConfig
KL = peer.RootInvKLShampooPreconditionerConfig
EIGENDECOMPOSED = peer.EigendecomposedShampooPreconditionerConfig
EIGENDECOMPOSED_KL = peer.EigendecomposedKLShampooPreconditionerConfig
CORRECTED = peer.EigenvalueCorrectedShampooPreconditionerConfig

EIGEN = types.EigenConfig()
AFTER = types.EigenConfig(
    rank_deficient_stability_config=types.PerturbationConfig(perturb_before_computation=False)
)
# Run to the end, so that the peer's own result is good to float64.
NEWTON = types.CoupledNewtonConfig(tolerance=1e-13)
HIGHER = types.CoupledHigherOrderConfig(rel_epsilon=0.0, abs_epsilon=1e-6, tolerance=1e-20)
RELATIVE = types.CoupledHigherOrderConfig(rel_epsilon=1e-5, abs_epsilon=0.0, tolerance=1e-20)
LARGER = types.CoupledHigherOrderConfig(rel_epsilon=1e-5, abs_epsilon=1e-6, tolerance=1e-20)
EIGH = types.EighEigendecompositionConfig()
QR = types.QREigendecompositionConfig()
# For eigenvalue-corrected Shampoo, which sees the bases themselves: those of a null space are a
# matter of rounding. So vectors, of which each adds a rank of one, have none, and the others begin
# when their factors are of full rank.
FULL_RANK = {
    "ignored_basis_change_dims": {1: [0]},
    "precondition_frequency": 6,
    "start_preconditioning_step": 6,
}


def maker(config=EIGEN, kind=PLAIN, dtype=torch.float64, **rest):
    """A function of parameters that makes the peer's optimizer, of small blocks, all in dtype."""
    options = {
        "lr": 1e-2, "betas": (0.9, 0.99), "epsilon": 1e-6, "max_preconditioner_dim": 20,
        "precondition_frequency": 3, "start_preconditioning_step": 3,
        "grafting_config": peer.AdamPreconditionerConfig(beta2=0.99, epsilon=1e-8),
    }  # fmt: skip
    fields = {field.name for field in dataclasses.fields(kind)}
    options |= {name: rest.pop(name) for name in list(rest) if name not in fields}
    rest = {name: dtype for name in fields if name.endswith("_dtype")} | rest
    preconditioner = kind(amortized_computation_config=config, **rest)
    return lambda parameters: peer.DistributedShampoo(
        parameters, preconditioner_config=preconditioner, **options
    )


def kernel_config(**options):
    return ours.KernelRootInvConfig(**options)


def check(make, model="mlp"):
    """To 1e-9, in float64."""
    check_agreement(ours.INTEGRATION, make, model, torch.float64)


def switched(enabled):
    """What to run inside of."""
    return ours.enable() if enabled else contextlib.nullcontext()


def blocks_of(parameters, optimizer):
    """The peer's state of every block, in order."""
    states = (optimizer.state[p] for p in parameters)
    return [b["shampoo"] for state in states for b in state.values() if isinstance(b, dict)]


def trained(make, enabled, shapes, steps, dtype=torch.float64, without=()):
    """(parameters, the peer's optimizer) after noise for gradients, of a scale to each parameter;
    those in `without` get none."""
    generator = torch.Generator().manual_seed(3)
    parameters = [torch.zeros(s, dtype=dtype, requires_grad=True) for s in shapes]
    with switched(enabled):
        optimizer = make(parameters)
        for _ in range(steps):
            for i, p in enumerate(parameters):
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.grad = None if i in without else (noise * (i + 1)).to(dtype)
            optimizer.step()
    return parameters, optimizer
