"""A strict upper bound on the largest eigenvalue, from O(n²) work."""

from collections.abc import Iterator

import torch
from torch import Tensor

from shampoo_kernels.chooser import choose_for
from shampoo_kernels.ops import common

_OP = "eigenvalue_bound"
_CHUNK = 1 << 20  # elements of one float64 piece of the reference: 8 MiB, four of them alive


def eigenvalue_bound(A: Tensor) -> Tensor:
    """b + 0.01*|b|, b = min(Frobenius, Wolkowicz-Styan, Minc): above the largest eigenvalue.

    For symmetric positive semi-definite blocks that is 1.01 times the least of the three. The sums
    run in float64 on entries scaled by the largest, so that the bound holds for flat blocks, where
    the textbook formulas round below the eigenvalue, and at every scale. A bound that is no
    number of the dtype rounds up, to inf at the end of its range.

    Args:
        A: (*, n, n) float32 or float64, any strides; only the lower triangle is read.

    Returns:
        (*,), dtype of A. 0 for a zero or empty block; NaN for a block that holds a NaN, else inf
        for one that holds an Inf, without touching other blocks.

    Raises:
        TypeError: another dtype; ValueError: another shape, or A requires grad.

    Sources: Wolkowicz and Styan 1980; Minc 1988 (for |A|, whose spectral radius bounds A's).
    """
    (A,) = common.as_tensors(_OP, A=A)
    straight = common.check_tensors(_OP, A=A)
    common.check_square(_OP, "A", A, batched=False)
    op = _implementation if straight else torch.ops.shampoo_kernels.eigenvalue_bound
    return common.unstack(op(common.stack(A)), A.shape[:-2])


def bound_ref(A: Tensor) -> Tensor:
    """(B, n, n) -> (B,) in pieces of bounded memory: chunks of blocks, strips of large blocks."""
    if A.device.type == "mps":  # has no float64
        return bound_ref(A.cpu()).to(A.device)
    batch, n, _ = A.shape
    if A.numel() == 0:
        return A.new_zeros(batch)
    return torch.cat([_bound(part) for part in A.split(max(1, _CHUNK // (n * n)))])


def _bound(A: Tensor) -> Tensor:
    n = A.shape[-1]
    scale = A.new_zeros(A.shape[0]).double()
    for rows, piece in _strips(A):
        scale = torch.maximum(scale, piece.tril(rows.start).abs().amax((-2, -1)))
    divisor = torch.where((scale > 0) & (scale < torch.inf), scale, 1.0).view(-1, 1, 1)

    diagonal = A.diagonal(dim1=-2, dim2=-1).double() / divisor[:, 0]  # (B, n)
    sums, off_diagonal = diagonal.abs(), torch.zeros_like(scale)
    for rows, piece in _strips(A):
        lower = piece.tril(rows.start - 1).div_(divisor).abs_()
        sums[:, rows] += lower.sum(-1)
        sums[:, : rows.stop] += lower.sum(-2)
        off_diagonal += 2 * lower.square_().sum((-2, -1))
    weighted = diagonal.abs() * sums  # row i: sum_j |a_ij| r_j
    for rows, piece in _strips(A):
        lower = piece.tril(rows.start - 1).div_(divisor).abs_()
        weighted[:, rows] += (lower @ sums[:, : rows.stop, None]).squeeze(-1)
        weighted[:, : rows.stop] += (lower.mT @ sums[:, rows, None]).squeeze(-1)

    mean = diagonal.mean(-1)
    spread = off_diagonal + (diagonal - mean[:, None]).square().sum(-1)  # n * s², centred
    frobenius = (off_diagonal + diagonal.square().sum(-1)).sqrt()
    wolkowicz_styan = mean + (spread * (n - 1) / n).sqrt()
    minc = (weighted / torch.where(sums > 0, sums, 1.0)).amax(-1)
    bound = torch.minimum(torch.minimum(frobenius, wolkowicz_styan), minc)
    bound = (bound + 0.01 * bound.abs()) * scale
    return _round_up(torch.where(torch.isfinite(scale), bound, scale), A.dtype)


def _strips(A: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows and A[:, rows, :end of rows] as a float64 copy, down the lower triangle."""
    n = A.shape[-1]
    height = max(1, _CHUNK // (A.shape[0] * n))
    for start in range(0, n, height):
        rows = slice(start, min(start + height, n))
        yield rows, A[:, rows, : rows.stop].to(torch.float64, copy=True)


def _round_up(bound: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = bound.to(dtype)
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.double() < bound, above, rounded)


def _check(A: Tensor) -> None:
    common.check_dtype(_OP, "A", A, common.MASTERS)
    common.check_square(_OP, "A", A)


def _implementation(A: Tensor) -> Tensor:
    _check(A)
    backend = choose_for(_OP, A)
    if backend == "native":
        return torch.ops.shampoo_kernels_native.eigenvalue_bound(A)
    if backend == "triton":
        from shampoo_kernels.kernels.eigenvalue_bound import eigenvalue_bound as bound_triton

        return bound_triton(A)
    return bound_ref(A)


def _fake(A: Tensor) -> Tensor:
    _check(A)
    return A.new_empty(A.shape[0])


common.register("eigenvalue_bound(Tensor A) -> Tensor", _implementation, _fake)
