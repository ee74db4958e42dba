"""inverse_root against batched torch.linalg.eigh with rebuild, at the same ridge."""

import pytest
import torch
from conftest import QUICK

from shampoo_kernels import eigenvalue_bound, inverse_root

STACKS = [(256, 32), (128, 64), (64, 128), (16, 256)] + ([] if QUICK else [(4, 512), (2, 1024)])


@pytest.mark.parametrize("kappa", [1e4], ids=["1e4"])
@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("stack", STACKS, ids=str)
def bench_inverse_root(versus, stack, p, kappa):
    batch, n = stack
    A = _condition(batch, n, kappa)
    bound = eigenvalue_bound(A)[:, None]
    exact = _eigh_root(A.double(), p, bound.double())

    def relative(root):
        return ((root.double() - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).max()

    def newton():
        return inverse_root(A, p, method="newton").root

    baselines = {"torch.linalg.eigh": lambda: _eigh_root(A, p, bound)}
    if n <= 128:
        baselines["our newton"] = newton
    versus(
        lambda: inverse_root(A, p),
        baselines,
        case=f"{batch} x {n}², p = {p}, condition {kappa:.0e}",
        errors={
            "ours": relative(inverse_root(A, p).root),
            "torch.linalg.eigh": relative(_eigh_root(A, p, bound)),
            "our newton": relative(newton()),
        },
    )


def _condition(batch, n, kappa):
    Q = torch.linalg.qr(torch.randn(batch, n, n, dtype=torch.float64)).Q
    A = (Q * torch.logspace(0, -torch.tensor(kappa).log10(), n, dtype=torch.float64)) @ Q.mT
    return ((A + A.mT) / 2).float()


def _eigh_root(A, p, bound):
    """The best that a user can write today; it raises for the whole stack on one NaN."""
    values, vectors = torch.linalg.eigh(A)
    return (vectors * (values + 1e-6 * bound).pow(-1 / p).unsqueeze(-2)) @ vectors.mT
