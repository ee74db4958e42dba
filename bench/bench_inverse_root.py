"""inverse_root against batched torch.linalg.eigh with rebuild, at the same ridge."""

import pytest
import torch
from conftest import QUICK

from shampoo_kernels import eigenvalue_bound, inverse_root

STACKS = [(256, 32), (128, 64), (64, 128), (16, 256)]
STACKS += [] if QUICK else [(4, 512), (2, 1024), (1, 512), (1, 1024)]


@pytest.mark.parametrize("ridge", [1e-4, 1e-6])
@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("stack", STACKS, ids=str)
def bench_inverse_root(versus, stack, p, ridge):
    A = _condition(*stack, 1e4)
    shift = ridge * eigenvalue_bound(A)[:, None]
    exact = _eigh_root(A.double(), p, shift.double())

    def relative(root):
        return ((root.double() - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).max()

    functions = {
        "ours": lambda: inverse_root(A, p, ridge=ridge).root,
        "torch.linalg.eigh": lambda: _eigh_root(A, p, shift),
        "ours, by eigh": lambda: inverse_root(A, p, ridge=ridge, method="eigh").root,
        "ours, by newton": lambda: inverse_root(A, p, ridge=ridge, method="newton").root,
    }
    errors = {name: relative(function()) for name, function in functions.items()}
    versus(
        functions.pop("ours"),
        functions,
        case=f"{stack[0]} x {stack[1]}², p = {p}, ridge {ridge:.0e}, condition 1e4",
        errors=errors,
    )


def _condition(batch, n, kappa):
    Q = torch.linalg.qr(torch.randn(batch, n, n, dtype=torch.float64)).Q
    A = (Q * torch.logspace(0, -torch.tensor(kappa).log10(), n, dtype=torch.float64)) @ Q.mT
    return ((A + A.mT) / 2).float()


def _eigh_root(A, p, shift):
    """The best that a user can write today; it raises for the whole stack on one NaN."""
    values, vectors = torch.linalg.eigh(A)
    return (vectors * (values + shift).pow(-1 / p).unsqueeze(-2)) @ vectors.mT
