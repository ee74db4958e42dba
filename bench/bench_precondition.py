"""precondition against two matrix products and a norm."""

import pytest
import torch

from shampoo_kernels import precondition


@pytest.mark.parametrize("shape", [(64, 128, 128), (16, 256, 256), (2, 1024, 1024)], ids=str)
def bench_precondition(versus, shape):
    batch, m, n = shape
    grad, left, right = torch.randn(shape), torch.randn(batch, m, m), torch.randn(batch, n, n)
    exact = left.double() @ grad.double() @ right.double()

    def plain():
        result = torch.bmm(torch.bmm(left, grad), right)
        return result, result.square().sum((1, 2))

    versus(
        lambda: precondition(grad, left, right),
        {"bmm, bmm, sum": plain},
        case=f"{batch} x {m} x {n}",
        flops=2 * batch * m * n * (m + n),
        errors={
            "ours": (precondition(grad, left, right)[0] - exact).norm() / exact.norm(),
            "bmm, bmm, sum": (plain()[0] - exact).norm() / exact.norm(),
        },
    )
