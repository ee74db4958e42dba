"""eigenvalue_bound against the same three bounds in plain torch (not strict), and eigvalsh."""

import pytest
import torch
from conftest import QUICK

from shampoo_kernels import eigenvalue_bound


@pytest.mark.parametrize("stack", [(256, 64), (64, 256)] + ([] if QUICK else [(8, 1024)]), ids=str)
def bench_eigenvalue_bound(versus, stack):
    batch, n = stack
    G = torch.randn(batch, n, n)
    A = G @ G.mT / n
    largest = torch.linalg.eigvalsh(A.double())[:, -1]

    def looseness(bound):
        return (bound.double() / largest - 1).max()

    versus(
        lambda: eigenvalue_bound(A),
        {"plain torch": lambda: _plain(A), "eigvalsh": lambda: torch.linalg.eigvalsh(A)},
        case=f"{batch} x {n}² (error: how far above the largest eigenvalue)",
        errors={"ours": looseness(eigenvalue_bound(A)), "plain torch": looseness(_plain(A))},
    )


def _plain(A):
    n = A.shape[-1]
    frobenius = A.norm(dim=(1, 2))
    mean = A.diagonal(dim1=1, dim2=2).mean(-1)
    wolkowicz = mean + ((frobenius**2 / n - mean**2).clamp(min=0) * (n - 1)).sqrt()
    rows = A.abs().sum(-1)
    minc = ((A.abs() @ rows[..., None])[..., 0] / rows).amax(-1)
    return 1.01 * torch.stack([frobenius, wolkowicz, minc]).amin(0)
