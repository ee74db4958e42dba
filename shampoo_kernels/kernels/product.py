"""The one product kernel: D = a*I + b*C + c*A@B over stacks, with A@B summed in float32.

Everything large in this package is one call of it: Gram statistics (A = G, B = Gᵀ, C = D = the
statistic, symmetric), the steps of root iterations (A, B polynomials of one matrix), power steps,
preconditioning.
"""

import triton
import triton.language as tl
from torch import Tensor

from shampoo_kernels.kernels.launch import Factor, prepare, run
from shampoo_kernels.kernels.tiles import rectangle, triangle

# The interpreter multiplies the bit patterns of bfloat16 and knows neither bf16x3 nor bf16x6.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product_kernel(
    A, B, C, D, D16, measured,  # descriptors, or pointers: (outer, blocks, rows, columns)
    m, n, k, blocks,
    A_strides, B_strides, C_strides, D_strides, D16_strides,
    a, b, c, scale16, lift,  # floats, or pointers to one element or one per block
    a_stride: tl.constexpr, b_stride: tl.constexpr, c_stride: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr,
    SYMMETRIC: tl.constexpr, MEASURE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of D. With SYMMETRIC, A@B is symmetric by contract, the tiles are square, those of
    the lower triangle are computed, of C nothing above the diagonal is used, and each tile is read
    and written, mirrored too, by one program: C may be D."""
    row_tiles, column_tiles = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    if SYMMETRIC:
        tiles = row_tiles * (row_tiles + 1) // 2
        tile, stack = tl.program_id(0) % tiles, tl.program_id(0) // tiles
        row, column = triangle(tile, row_tiles, GROUP)
    else:
        tiles = row_tiles * column_tiles
        tile, stack = tl.program_id(0) % tiles, tl.program_id(0) // tiles
        row, column = rectangle(tile, row_tiles, column_tiles, GROUP)
    row, column, outer, block = row * BLOCK_M, column * BLOCK_N, stack // blocks, stack % blocks
    a, b, c = _factor(a, block, a_stride), _factor(b, block, b_stride), _factor(c, block, c_stride)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.where(c == 0, 0, tl.cdiv(k, BLOCK_K))  # 0 times NaN must not happen
    for step in range(steps):
        x = _load(A, outer, block, row, step * BLOCK_K, m, k, A_strides,
                  BLOCK_M, BLOCK_K, A_TRANSPOSED, DESCRIPTORS)  # fmt: skip
        y = _load(B, outer, block, step * BLOCK_K, column, k, n, B_strides,
                  BLOCK_K, BLOCK_N, B_TRANSPOSED, DESCRIPTORS)  # fmt: skip
        acc = _dot(x.to(OPERAND), y.to(OPERAND), acc, PRECISION)

    out = c * acc
    if C is not None:
        if b != 0:
            old = _load(C, outer, block, row, column, m, n, C_strides,
                        BLOCK_M, BLOCK_N, False, DESCRIPTORS)  # fmt: skip
            old = old.to(tl.float32)
            if lift is not None:
                old *= tl.load(lift + block)
            out += b * old
    rows, columns = row + tl.arange(0, BLOCK_M)[:, None], column + tl.arange(0, BLOCK_N)[None, :]
    out += tl.where(rows == columns, a, 0.0)
    if SYMMETRIC:
        mirrored = tl.trans(out)
        out = tl.where(rows >= columns, out, mirrored)  # changes diagonal tiles alone
    if measured is not None:
        inside = (rows < m) & (columns < n)
        value = _measure(tl.where(inside, out, 0.0), inside & (rows == columns), MEASURE)
        tl.store(measured + stack.to(tl.int64) * tiles + tile, value)

    _store(D, out, outer, block, row, column, m, n, D_strides, BLOCK_M, BLOCK_N, DESCRIPTORS)
    if D16 is not None:
        _store(D16, scale16 * out, outer, block, row, column, m, n, D16_strides,
               BLOCK_M, BLOCK_N, DESCRIPTORS)  # fmt: skip
    if SYMMETRIC:
        if row != column:
            _store(D, mirrored, outer, block, column, row, n, m, D_strides,
                   BLOCK_N, BLOCK_M, DESCRIPTORS)  # fmt: skip
            if D16 is not None:
                _store(D16, scale16 * mirrored, outer, block, column, row, n, m, D16_strides,
                       BLOCK_N, BLOCK_M, DESCRIPTORS)  # fmt: skip


@triton.jit
def _factor(x, block, STRIDE: tl.constexpr):
    """A scalar: itself, or the element of this block; STRIDE is None, 0 or 1."""
    if STRIDE is None:
        return x
    else:
        return tl.load(x + block * STRIDE).to(tl.float32)


@triton.jit
def _dot(x, y, acc, PRECISION: tl.constexpr):
    if _INTERPRETED:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def _measure(out, diagonal, MEASURE: tl.constexpr):
    """max |D - I| of the tile, inf where that is NaN, or the sum of the squares of the tile."""
    if MEASURE == "distance":
        distance = tl.abs(out - diagonal.to(tl.float32))
        distance = tl.where(distance == distance, distance, float("inf"))
        return tl.max(distance)
    else:
        return tl.sum(out * out)


@triton.jit
def _pointers(base, outer, block, row, column, strides, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """All in 64 bits: stacks exceed 2^31 elements."""
    rows = row + tl.arange(0, HEIGHT)[:, None].to(tl.int64)
    columns = column + tl.arange(0, WIDTH)[None, :].to(tl.int64)
    base += tl.cast(outer, tl.int64) * strides[0] + tl.cast(block, tl.int64) * strides[1]
    return base + rows * strides[2] + columns * strides[3], rows, columns


@triton.jit
def _load(
    source, outer, block, row, column, height, width, strides,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A tile at (row, column), zeros outside of height x width; TRANSPOSED descriptors describe the
    transposed matrix."""
    if DESCRIPTORS and TRANSPOSED:
        return tl.trans(source.load([outer, block, column, row]).reshape(WIDTH, HEIGHT))
    elif DESCRIPTORS:
        return source.load([outer, block, row, column]).reshape(HEIGHT, WIDTH)
    else:
        p, rows, columns = _pointers(source, outer, block, row, column, strides, HEIGHT, WIDTH)
        return tl.load(p, mask=(rows < height) & (columns < width), other=0.0)


@triton.jit
def _store(
    target, tile, outer, block, row, column, height, width, strides,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    if DESCRIPTORS:
        tile = tile.to(target.dtype).reshape(1, 1, HEIGHT, WIDTH)
        target.store([outer, block, row, column], tile)
    else:
        p, rows, columns = _pointers(target, outer, block, row, column, strides, HEIGHT, WIDTH)
        mask = (rows < height) & (columns < width)
        tl.store(p, tile.to(target.dtype.element_ty), mask=mask)


def product(
    A: Tensor | None,
    B: Tensor | None,
    D: Tensor,
    *,
    op: str,
    a: Factor = 0.0,
    b: Factor = 0.0,
    c: Factor = 1.0,
    C: Tensor | None = None,
    D16: Tensor | None = None,
    scale16: float = 1.0,
    lift: Tensor | None = None,
    symmetric: bool = False,
    measure: str | None = None,
    precision: str = "highest",
) -> Tensor | None:
    """D <- a*I + b*C + c*A@B and D16 <- scale16 * D, on stacks (B, m, n) or (O, B, m, n).

    Args:
        A, B: (.., m, k) and (.., k, n), any strides (transposes cost nothing), any float dtype but
            float64; None for c = 0, where they are not read.
        D: (.., m, n); D16 as D, both of any float dtype but float64.
        op: the rows of the table to use.
        a, b, c: floats, or tensors of one element or of B, one per block, on the device. b = 0 does
            not read C, c = 0 reads neither A nor B.
        C: (.., m, n); may be D.
        lift: (B,) float32 contiguous powers of two that C is multiplied by first, for blocks whose
            b would be no float32.
        symmetric: A@B is symmetric. Half is computed and D is exactly symmetric; of C only the
            lower triangle is used.
        measure: "distance" for max |D - I|, "squares" for the sum of D's squares.
        precision: "highest", "high", "medium", or a precision of tl.dot.

    Returns:
        With `measure`, one value per tile (O*B, tiles), for the caller to reduce: sums come out the
        same in every run, which atomics do not promise.
    """
    launch = prepare(A, B, D, op=op, a=a, b=b, c=c, C=C, D16=D16, scale16=scale16, lift=lift,
                     symmetric=symmetric, measure=measure, precision=precision)  # fmt: skip
    if launch is None:
        return None if measure is None else D.new_zeros(D.shape[:-2].numel(), 0)
    run(product_kernel, launch, D)
    return launch.arguments[5]
