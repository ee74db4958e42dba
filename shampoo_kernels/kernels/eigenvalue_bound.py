"""A strict upper bound on the largest eigenvalue of float32 blocks: ops/eigenvalue_bound.py.

Sums run in float64, in which no square of a float32 overflows or vanishes: unlike for float64
blocks nothing has to be scaled, and no pass is spent on the largest entry. Every sum has one order,
a function of n, so that a block's bound is the same in every run and beside any neighbours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shampoo_kernels.kernels.launch import Launch, run

# Up to here one program reads a block twice, in one launch. One program draws about 1/100 of an
# H100's bandwidth, so a larger block is shared out over strips of rows, in three launches: the
# strips of the second sum need the whole of the first. Not measured yet.
_ONE_PROGRAM = 512
_STRIP, _WIDTH = 32, 64
_ELEMENTS = 2048  # of a float64 tile: 16 a thread of 4 warps


def eigenvalue_bound(A: Tensor) -> Tensor:
    """(B, n, n) float32, any strides -> (B,); reads the lower triangle only, never synchronises."""
    batch, n, _ = A.shape
    bound = torch.zeros(batch, dtype=torch.float32, device=A.device)
    if A.numel() == 0:
        return bound
    if n <= _ONE_PROGRAM:
        side = max(16, triton.next_power_of_2(n))
        meta = {"SIDE": side, "HEIGHT": min(side, _ELEMENTS // side), "num_warps": 4}
        run(bound_kernel, Launch((batch,), (A, bound, n, A.stride()), meta), A)
        return bound
    strips = triton.cdiv(n, _STRIP)
    sums, weighted = torch.empty(2, batch, n, dtype=torch.float64, device=A.device)
    squares = torch.empty(batch, strips, dtype=torch.float64, device=A.device)
    meta = {"HEIGHT": _STRIP, "WIDTH": _WIDTH, "num_warps": 4}
    for x, y in ((None, sums), (sums, weighted)):
        strip = (A, x, y, squares if x is None else None, n, A.stride())
        run(strip_kernel, Launch((batch * strips,), strip, meta), A)
    arguments = (A, sums, weighted, squares, bound, n, strips, A.stride())
    run(combine_kernel, Launch((batch,), arguments, {"WIDTH": 512, "num_warps": 4}), A)
    return bound


@triton.jit
def bound_kernel(A, bound, n, strides, SIDE: tl.constexpr, HEIGHT: tl.constexpr):
    """One block; vectors of all its rows stay in registers, where an entry i is picked or set by
    comparing indices."""
    block = tl.program_id(0)
    j = tl.arange(0, SIDE)
    diagonal = _diagonal(A, block, j, n, strides)
    sums, squares = tl.abs(diagonal), diagonal * diagonal
    strips = tl.cdiv(n, HEIGHT)
    for strip in range(strips):
        i = strip * HEIGHT + tl.arange(0, HEIGHT)
        lower = _strictly_lower(A, block, i[:, None], j[None, :], n, strides)
        row = tl.where(i[:, None] == j[None, :], tl.sum(lower, 1)[:, None], 0.0)
        sums += tl.sum(lower, 0) + tl.sum(row, 0)
        squares += 2.0 * tl.sum(lower * lower, 0)
    weighted = tl.abs(diagonal) * sums
    for strip in range(strips):
        i = strip * HEIGHT + tl.arange(0, HEIGHT)
        lower = _strictly_lower(A, block, i[:, None], j[None, :], n, strides)
        here = i[:, None] == j[None, :]
        own = tl.sum(tl.where(here, sums[None, :], 0.0), 1)
        row = tl.where(here, tl.sum(lower * sums[None, :], 1)[:, None], 0.0)
        weighted += tl.sum(lower * own[:, None], 0) + tl.sum(row, 0)
    inside = j < n
    count = tl.sum(inside.to(tl.float64))
    mean = tl.sum(diagonal) / count
    deviation = tl.where(inside, diagonal - mean, 0.0)
    total = tl.sum(squares)
    # off-diagonal squares and the centred diagonal: no difference of large sums
    spread = tl.sum(squares - diagonal * diagonal) + tl.sum(deviation * deviation)
    minc = tl.max(weighted / tl.where(sums > 0, sums, 1.0))
    tl.store(bound + block, _least(total, mean, spread, minc, count))


@triton.jit
def strip_kernel(
    A, x, y, squares, n, strides, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """y = |A| x for HEIGHT rows of one block, x = None for ones; and the sum of the squares beside
    the diagonal. To the right of the diagonal the rows are columns of the lower triangle."""
    strips = tl.cdiv(n, HEIGHT)
    block, strip = tl.program_id(0) // strips, tl.program_id(0) % strips
    i = strip * HEIGHT + tl.arange(0, HEIGHT)
    base = block.to(tl.int64) * n
    own = _diagonal(A, block, i, n, strides)
    total = tl.abs(own) * _weights(x, base, i, n)
    found = tl.zeros((HEIGHT,), tl.float64)
    for step in range(tl.cdiv(strip * HEIGHT + HEIGHT, WIDTH)):
        j = step * WIDTH + tl.arange(0, WIDTH)
        left = _strictly_lower(A, block, i[:, None], j[None, :], n, strides)
        total += tl.sum(left * _weights(x, base, j, n)[None, :], 1)
        found += tl.sum(left * left, 1)
    for step in range(strip * HEIGHT // WIDTH, tl.cdiv(n, WIDTH)):
        j = step * WIDTH + tl.arange(0, WIDTH)
        below = _strictly_lower(A, block, j[:, None], i[None, :], n, strides)
        total += tl.sum(below * _weights(x, base, j, n)[:, None], 0)
        found += tl.sum(below * below, 0)
    tl.store(y + base + i, total, mask=i < n)
    if squares is not None:
        tl.store(squares + block * strips + strip, tl.sum(found))


@triton.jit
def combine_kernel(
    A, sums, weighted, squares, bound, n, strips, strides, WIDTH: tl.constexpr,
):  # fmt: skip
    """From what the strips of one block have found to its bound."""
    block = tl.program_id(0)
    base = block.to(tl.int64) * n
    off_diagonal, trace = tl.zeros((WIDTH,), tl.float64), tl.zeros((WIDTH,), tl.float64)
    total, minc = tl.zeros((WIDTH,), tl.float64), tl.zeros((WIDTH,), tl.float64)
    counted, spread = tl.zeros((WIDTH,), tl.float64), tl.zeros((WIDTH,), tl.float64)
    for step in range(tl.cdiv(strips, WIDTH)):
        i = step * WIDTH + tl.arange(0, WIDTH)
        off_diagonal += tl.load(squares + block * strips + i, mask=i < strips, other=0.0)
    for step in range(tl.cdiv(n, WIDTH)):
        i = step * WIDTH + tl.arange(0, WIDTH)
        diagonal = _diagonal(A, block, i, n, strides)
        r = tl.load(sums + base + i, mask=i < n, other=0.0)
        product = tl.load(weighted + base + i, mask=i < n, other=0.0)
        trace += diagonal
        total += diagonal * diagonal
        counted += (i < n).to(tl.float64)
        minc = tl.maximum(minc, product / tl.where(r > 0, r, 1.0))
    count = tl.sum(counted)
    mean = tl.sum(trace) / count
    for step in range(tl.cdiv(n, WIDTH)):
        i = step * WIDTH + tl.arange(0, WIDTH)
        deviation = tl.where(i < n, _diagonal(A, block, i, n, strides) - mean, 0.0)
        spread += deviation * deviation
    beside = tl.sum(off_diagonal)
    value = _least(beside + tl.sum(total), mean, beside + tl.sum(spread), tl.max(minc), count)
    tl.store(bound + block, value)


@triton.jit
def _least(squares, mean, spread, minc, count):
    """1.01 times the least of Frobenius, Wolkowicz-Styan and Minc in float32, rounded up; what is
    NaN or infinite is so in the sum of the squares, and comes out as that."""
    frobenius = tl.sqrt(squares)
    wolkowicz_styan = mean + tl.sqrt(spread * (count - 1.0) / count)
    least = tl.minimum(tl.minimum(frobenius, wolkowicz_styan), minc)
    bound = tl.where(frobenius - frobenius == 0.0, least + 0.01 * tl.abs(least), frobenius)
    rounded = bound.to(tl.float32)
    bits = rounded.to(tl.int32, bitcast=True)
    above = tl.where(rounded > 0, bits + 1, tl.where(rounded < 0, bits - 1, 1))
    above = above.to(tl.float32, bitcast=True)
    return tl.where(rounded.to(tl.float64) < bound, above, rounded)


@triton.jit
def _strictly_lower(A, block, i, j, n, strides):
    """|a_ij| in float64 where j < i < n, else 0."""
    return tl.abs(_entries(A, block, i, j, (j < i) & (i < n), strides))


@triton.jit
def _diagonal(A, block, i, n, strides):
    return _entries(A, block, i, i, i < n, strides)


@triton.jit
def _entries(A, block, i, j, mask, strides):
    """64-bit offsets: stacks exceed 2^31 elements."""
    A += tl.cast(block, tl.int64) * strides[0]
    offsets = i.to(tl.int64) * strides[1] + j.to(tl.int64) * strides[2]
    return tl.load(A + offsets, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _weights(x, base, i, n):
    if x is None:
        return tl.where(i < n, 1.0, 0.0).to(tl.float64)
    else:
        return tl.load(x + base + i, mask=i < n, other=0.0)
