"""Gram accumulation by the product kernel, in place, both sides, weighted, and split over k."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shampoo_kernels.kernels import table
from shampoo_kernels.kernels.launch import Launch, factor_stride, run
from shampoo_kernels.kernels.product import _factor, _load, _store, product
from shampoo_kernels.kernels.tiles import triangle

_BLOCK = 64  # of the kernel that adds up the parts of a split sum


def accumulate_(
    stat: Tensor, grads: Tensor, weight: Tensor | None, beta: float | Tensor, alpha: float | Tensor,
    precision: str,
) -> None:  # fmt: skip
    """stat (B, m, m) <- beta*stat + alpha * sum_s G_s W G_sᵀ for grads (B, S, m, n), W (B, n, n).

    stat and W float32, grads any float dtype but float64; factors: floats, or tensors (1,) or (B,).
    Only the lower triangle of stat is read, both are written. Where alpha is 0, neither grads nor
    weight is read, where beta is 0, stat is not.
    """
    G = grads.transpose(1, 2).flatten(2)  # (B, m, S*n); a view for S = 1, and for every Gᵀ G
    left = G
    if weight is not None:
        batch, samples, m, n = grads.shape
        left = torch.empty(batch, m, samples, n, dtype=torch.float32, device=stat.device)
        wide = weight.expand(samples, -1, -1, -1)
        read = alpha.ne(0).float() if isinstance(alpha, Tensor) else float(alpha != 0)
        product(grads.transpose(0, 1), wide, left.permute(2, 0, 1, 3), op="gram_ema_", c=read,
                precision=precision)  # fmt: skip
        left = left.flatten(2)
    right = G.mT
    batch, m, k = *stat.shape[:2], G.shape[-1]
    target = table.target(stat.device)
    mode = table.mode(left.dtype, right.dtype, precision, target)
    splits = table.splits(table.select(target, "gram_ema_", mode, m, k, True), batch, m, k)
    if splits == 1:
        product(left, right, stat, op="gram_ema_", b=beta, c=alpha, C=stat, symmetric=True,
                precision=precision)  # fmt: skip
        return
    parts = torch.empty(splits, *stat.shape, dtype=torch.float32, device=stat.device)
    left = left.unflatten(-1, (splits, -1)).permute(2, 0, 1, 3)
    right = right.unflatten(-2, (splits, -1)).transpose(0, 1)
    product(left, right, parts, op="gram_ema_", c=alpha, symmetric=True, precision=precision)
    combine_(stat, parts, beta)


def combine_(stat: Tensor, parts: Tensor, beta: float | Tensor) -> None:
    """stat (B, m, m) <- beta*stat + sum of parts (S, B, m, m), in the order of S."""
    batch, m, _ = stat.shape
    rows = triton.cdiv(m, _BLOCK)
    arguments = (stat, parts, m, (0, *stat.stride()), parts.stride(), beta)
    meta = {"beta_stride": factor_stride(beta), "SPLITS": parts.shape[0], "BLOCK": _BLOCK,
            "num_warps": 8}  # fmt: skip
    run(combine_kernel, Launch((batch * rows * (rows + 1) // 2,), arguments, meta), stat)


@triton.jit
def combine_kernel(
    stat, parts, m, stat_strides, parts_strides, beta,
    beta_stride: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of the lower triangle and its mirror image, as in the product kernel."""
    rows = tl.cdiv(m, BLOCK)
    tiles = rows * (rows + 1) // 2
    row, column = triangle(tl.program_id(0) % tiles, rows, 1)
    block, row, column = tl.program_id(0) // tiles, row * BLOCK, column * BLOCK
    beta = _factor(beta, block, beta_stride)
    out = tl.zeros((BLOCK, BLOCK), tl.float32)
    for part in tl.static_range(SPLITS):
        out += _load(parts, part, block, row, column, m, m, parts_strides,
                     BLOCK, BLOCK, False, False)  # fmt: skip
    if beta != 0:
        out += beta * _load(stat, block, block, row, column, m, m, stat_strides,
                            BLOCK, BLOCK, False, False)  # fmt: skip
    mirrored = tl.trans(out)
    i, j = row + tl.arange(0, BLOCK)[:, None], column + tl.arange(0, BLOCK)[None, :]
    out = tl.where(i >= j, out, mirrored)
    _store(stat, out, block, block, row, column, m, m, stat_strides, BLOCK, BLOCK, False)
    if row != column:
        _store(stat, mirrored, block, block, column, row, m, m, stat_strides, BLOCK, BLOCK, False)
