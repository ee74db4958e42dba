"""One power-iteration step towards the optimal Kronecker product approximation of E[g gᵀ]."""

import torch
from torch import Tensor

from shampoo_kernels.chooser import choose_for
from shampoo_kernels.ops import common, gram_ema

_OP = "kronecker_power_step"
SCHEMES = ("simultaneous", "alternating")


def kronecker_power_step(
    grads: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    scheme: str = "simultaneous",
    precision: str = "highest",
) -> tuple[Tensor, Tensor]:
    """(E[G R Gᵀ] / ‖R‖², E[Gᵀ L G] / ‖L‖²) for every block, E the mean over N, ‖.‖ Frobenius.

    One step from identities gives Shampoo's own statistics (scaled by 1/n and 1/m); repeated steps
    converge to the factors of the best R ⊗ L, and each alternating half-step is the least-squares
    optimum given the other factor. An instrument of analysis: in training, one step (Shampoo's
    statistics) does better than many.

    Args:
        grads: (*, N, m, n) sampled gradients, any strides; float32, bfloat16, float16, or float64
            with float64 factors.
        left, right: L (*, m, m) and R (*, n, n), symmetric (both triangles are read), one dtype,
            float32 or float64; not changed.
        scheme: "simultaneous", or "alternating": the new left makes the new right.
        precision: of float32 products on a GPU: "highest", "high" or "medium".

    Returns:
        (left, right), exactly symmetric, shapes and dtype of the given factors. A zero factor makes
        a zero on the other side, and so does N = 0; NaN or Inf stays in its block.

    Raises:
        TypeError: a dtype that is not listed; ValueError: any other mismatch, or a tensor that
        requires grad.

    Source: Van Loan and Pitsianis 1993; Morwani et al. 2024 (arXiv 2406.17748), Proposition 1.
    """
    grads, left, right = common.as_tensors(_OP, grads=grads, left=left, right=right)
    straight = common.check_tensors(_OP, grads=grads, left=left, right=right)
    if grads.ndim < 3:
        raise ValueError(f"{_OP}: grads must be (*, N, m, n), got {tuple(grads.shape)}")
    common.check_option(_OP, "scheme", scheme, SCHEMES)
    common.check_option(_OP, "precision", precision, common.PRECISIONS)
    *batch, _, m, n = grads.shape
    _check_factors(grads, left, right, (*batch, m, m), (*batch, n, n))
    op = _implementation if straight else torch.ops.shampoo_kernels.kronecker_power_step
    new = op(
        common.stack(grads, 3), common.stack(left), common.stack(right),
        scheme=scheme, precision=precision,
    )  # fmt: skip
    return common.unstack(new[0], left.shape), common.unstack(new[1], right.shape)


def _half_step(grads: Tensor, factor: Tensor, backend: str, precision: str) -> Tensor:
    """E[G W Gᵀ] / ‖W‖²: grads (B, N, m, n), W (B, n, n) -> (B, m, m).

    W / ‖W‖ is the weight and 1 / ‖W‖ the scalar, so that no square leaves the range of the dtype.
    A scalar of 0 (a zero factor) means that the gradients are not read.
    """
    batch, samples, m, _ = grads.shape
    norm = torch.linalg.vector_norm(factor, dim=(-2, -1), dtype=torch.float64)
    divisor = norm.masked_fill(norm == 0, 1.0)
    one = norm / divisor  # 0 for a zero factor, NaN for one that is not finite
    alpha = one.div_(divisor * max(samples, 1)).to(factor.dtype)
    weight = (factor / divisor.view(-1, 1, 1)).to(factor.dtype)
    new = factor.new_empty(batch, m, m)
    gram_ema.accumulate_(
        new, grads, weight, 0.0, 0.0, None, alpha, backend=backend, precision=precision
    )
    return new


def _check_factors(grads: Tensor, left: Tensor, right: Tensor, m: tuple, n: tuple) -> None:
    common.check_shape(_OP, "left", left, m, "for grads", grads)
    common.check_shape(_OP, "right", right, n, "for grads", grads)


def _check(grads, left, right, *, scheme="simultaneous", precision="highest") -> None:
    common.check_option(_OP, "scheme", scheme, SCHEMES)
    common.check_option(_OP, "precision", precision, common.PRECISIONS)
    common.check_dtype(_OP, "grads", grads, common.FLOATS)
    common.check_dtype(_OP, "left", left, common.MASTERS)
    common.check_dtype(_OP, "right", right, (left.dtype,))
    if grads.dtype == torch.float64 and left.dtype != torch.float64:
        raise TypeError(f"{_OP}: float64 grads need float64 factors, got {common.describe(left)}")
    if grads.ndim != 4:
        raise ValueError(f"{_OP}: grads must be (B, N, m, n), got {tuple(grads.shape)}")
    batch, _, m, n = grads.shape
    _check_factors(grads, left, right, (batch, m, m), (batch, n, n))
    common.check_same_device(_OP, grads, left=left, right=right)


def _implementation(
    grads, left, right, *, scheme="simultaneous", precision="highest"
) -> tuple[Tensor, Tensor]:
    _check(grads, left, right, scheme=scheme, precision=precision)
    backend = choose_for(_OP, left)
    new_left = _half_step(grads, right, backend, precision)
    source = new_left if scheme == "alternating" else left
    return new_left, _half_step(grads.mT, source, backend, precision)


def _fake(grads, left, right, *, scheme="simultaneous", precision="highest"):
    _check(grads, left, right, scheme=scheme, precision=precision)
    return left.new_empty(left.shape), right.new_empty(right.shape)


common.register(
    "kronecker_power_step(Tensor grads, Tensor left, Tensor right, *, "
    'str scheme="simultaneous", str precision="highest") -> (Tensor, Tensor)',
    _implementation,
    _fake,
)
