"""power_iteration and orthogonal_iteration against the same steps in plain torch and elsewhere, and
against the eigensolver that they stand in for. Errors: how far from the largest eigenvalue; how far
Qᵀ Q is from the identity."""

import pytest
import restated
import torch
from conftest import QUICK
from judging import errors_of
from rivals import PACKAGES, package

from shampoo_kernels import orthogonal_iteration, power_iteration

STACKS = [(16, 32)] if QUICK else [(256, 64), (32, 256), (4, 1024)]
STEPS, VECTORS = 10, 16


def _stack(batch, n):
    G = torch.randn(batch, n, n)
    return G @ G.mT / n


@pytest.mark.parametrize("stack", STACKS, ids=str)
def bench_power_iteration(versus, stack):
    A = _stack(*stack)
    largest = torch.linalg.eigvalsh(A.double())[:, -1]
    functions = {
        "ours": lambda: power_iteration(A, STEPS, VECTORS),
        "plain torch": lambda: restated.power_iteration(A, STEPS, VECTORS),
        "eigvalsh": lambda: torch.linalg.eigvalsh(A)[:, -1],
    }
    if (module := package("pytorch_optimizer")) is not None:
        iterate = module.optimizer.utils.matrix.batched_power_iteration
        name = f"pytorch_optimizer {PACKAGES['pytorch_optimizer']}"
        functions[name] = lambda: iterate(A, STEPS, VECTORS).flatten()
    if (module := package("heavyball")) is not None:
        functions[f"HeavyBall {PACKAGES['heavyball']}, one vector"] = lambda: (
            module.utils.max_eigenvalue_spd(A, STEPS)
        )
    errors = errors_of(functions, lambda found: (1 - found / largest).abs().max())
    versus(
        functions.pop("ours"),
        functions,
        case=f"power_iteration, {STEPS} steps, {VECTORS} vectors, {stack[0]} x {stack[1]}²",
        flops=2 * (STEPS + 1) * VECTORS * A.numel(),
        moved=(STEPS + 1) * A.nbytes,
        errors=errors,
    )


@pytest.mark.parametrize("stack", STACKS, ids=str)
def bench_orthogonal_iteration(versus, stack):
    A = _stack(*stack)
    Q = torch.linalg.eigh(A).eigenvectors
    eye = torch.eye(stack[1], dtype=torch.float64)

    def plain():
        new = torch.linalg.qr(A @ Q).Q
        return (new * (A @ new)).sum(-2), new

    functions = {
        "ours": lambda: orthogonal_iteration(A, Q),
        "plain torch": plain,
        "eigh": lambda: torch.linalg.eigh(A),
    }
    if (module := package("heavyball")) is not None:
        basis = Q.clone()

        def heavyball():
            module.utils.get_orthogonal_matrix_QR([A], [basis])
            return None, basis

        functions[f"HeavyBall {PACKAGES['heavyball']}, no eigenvalues"] = heavyball

    def departure(found):
        return (found[1].double().mT @ found[1].double() - eye).abs().max()

    errors = errors_of(functions, departure)
    versus(
        functions.pop("ours"),
        functions,
        case=f"orthogonal_iteration, one step, {stack[0]} x {stack[1]}²",
        flops=stack[0] * stack[1] ** 3 * (2 + 8 / 3 + 2),
        errors=errors,
    )
