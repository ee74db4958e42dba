"""left @ G @ right by the product kernel, and the squared norm from the last product's epilogue."""

import torch
from torch import Tensor

from shampoo_kernels.kernels.product import product


def precondition_(
    out: Tensor, grad: Tensor, left: Tensor | None, right: Tensor | None, precision: str
) -> Tensor:
    """out (B, m, n) float32 <- left (B, m, m) @ grad (B, m, n) @ right (B, n, n); returns (B,).

    One of left and right may be None. The norm is a sum over tiles in float64, in a fixed order.
    """
    if left is not None and right is not None:
        half = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
        product(left, grad, half, op="precondition", precision=precision)
        left, grad = None, half
    factors = (grad, right) if left is None else (left, grad)
    squares = product(*factors, out, op="precondition", measure="squares", precision=precision)
    assert squares is not None
    return squares.double().sum(1).to(out.dtype)
