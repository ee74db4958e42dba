"""precondition against two matrix products and a norm, on blocks of real models."""

import pytest
import torch
from cases import relative
from conftest import QUICK
from judging import errors_of

from shampoo_kernels import precondition

SHAPES = (
    [(4, 32, 48)]
    if QUICK
    else [(64, 128, 128), (3, 64, 576), (12, 768, 768), (6, 1024, 768), (2, 1024, 1024)]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_precondition(versus, shape, dtype):
    batch, m, n = shape
    grad = torch.randn(shape).to(dtype)
    left, right = torch.randn(batch, m, m), torch.randn(batch, n, n)
    exact = left.double() @ grad.double() @ right.double()

    def plain():
        result = torch.bmm(torch.bmm(left, grad.float()), right)
        return result, result.square().sum((1, 2))

    functions = {"ours": lambda: precondition(grad, left, right), "bmm, bmm, sum": plain}
    errors = errors_of(functions, lambda found: relative(found[0], exact))
    versus(
        functions.pop("ours"),
        functions,
        case=f"{batch} x {m} x {n} {str(dtype).removeprefix('torch.')}",
        flops=2 * batch * m * n * (m + n),
        moved=grad.nbytes + left.nbytes + right.nbytes + 4 * grad.numel(),
        errors=errors,
    )
