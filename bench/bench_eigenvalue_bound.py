"""eigenvalue_bound against the same three bounds in plain torch (not strict), and eigvalsh. The
error is how far above the largest eigenvalue the bound lies: that is the bound's, no failure."""

import math

import pytest
import restated
import torch
from conftest import QUICK
from judging import errors_of

from shampoo_kernels import eigenvalue_bound

STACKS = [(64, 32)] if QUICK else [(4096, 32), (256, 64), (64, 256), (8, 1024)]


@pytest.mark.parametrize("stack", STACKS, ids=str)
def bench_eigenvalue_bound(versus, stack):
    batch, n = stack
    G = torch.randn(batch, n, n)
    A = G @ G.mT / n
    largest = torch.linalg.eigvalsh(A.double())[:, -1]
    functions = {
        "ours": lambda: eigenvalue_bound(A),
        "plain torch": lambda: restated.plain_bound(A),
        "eigvalsh": lambda: torch.linalg.eigvalsh(A)[:, -1],
    }
    errors = errors_of(functions, lambda bound: (bound.double() / largest - 1).max())
    versus(
        functions.pop("ours"),
        functions,
        case=f"{batch} x {n}²",
        moved=A.nbytes,
        errors=errors,
        accepted=math.inf,
    )
