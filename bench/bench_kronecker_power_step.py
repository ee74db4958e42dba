"""kronecker_power_step against the two einsums that its formula is, and the same as products."""

import pytest
import torch
from cases import relative
from conftest import QUICK
from judging import errors_of

from shampoo_kernels import kronecker_power_step

CASES = [(8, 24, 32)] if QUICK else [(128, 128, 256), (512, 64, 64), (16, 768, 768)]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_kronecker_power_step(versus, case):
    samples, m, n = case
    grads = torch.randn(samples, m, n)
    left, right = torch.eye(m), torch.eye(n)

    def einsums():
        new_left = torch.einsum("bij,jk,blk->il", grads, right, grads) / samples
        new_right = torch.einsum("bji,jk,bkl->il", grads, left, grads) / samples
        return new_left / right.square().sum(), new_right / left.square().sum()

    def products(grads=grads, left=left, right=right):
        rows = grads.permute(1, 0, 2).reshape(m, -1)
        new_left = (grads @ right).permute(1, 0, 2).reshape(m, -1) @ rows.mT / samples
        new_right = (left @ grads).flatten(0, 1).mT @ grads.flatten(0, 1) / samples
        return new_left / right.square().sum(), new_right / left.square().sum()

    exact = products(grads.double(), left.double(), right.double())
    functions = {
        "ours": lambda: kronecker_power_step(grads, left, right),
        "einsum": einsums,
        "four products": products,
    }
    errors = errors_of(functions, lambda found: max(map(relative, found, exact)))
    versus(
        functions.pop("ours"),
        functions,
        case=f"{samples} samples of {m} x {n}",
        flops=samples * m * n * (3 * n + 3 * m),
        errors=errors,
    )
