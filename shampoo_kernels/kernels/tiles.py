"""Which tile of the output a program computes: every tile once, ordered so that neighbours share
operands in the L2.

Each map stands twice, for the kernels (tensors) and in plain Python, which the tests prove right.
"""

import math

import triton
import triton.language as tl


@triton.jit
def triangle(index, tiles, GROUP: tl.constexpr):
    """Tile `index` of the lower triangle of a square of `tiles` x `tiles`: (row, column <= row).

    Bands of GROUP tile rows follow each other; within a band, the columns left of its diagonal part
    come one by one, all rows of the band at once, then the diagonal part, a small triangle.
    """
    row = _triangle_row(index)
    start = row // GROUP * GROUP  # the band has the same tiles in both orders
    index -= start * (start + 1) // 2
    height = tl.minimum(tiles - start, GROUP)
    corner = tl.maximum(index - height * start, 0)
    corner_row = _triangle_row(corner)
    inside = index < height * start
    return (
        start + tl.where(inside, index % height, corner_row),
        tl.where(inside, index // height, start + corner - corner_row * (corner_row + 1) // 2),
    )


@triton.jit
def _triangle_row(index):
    """The row of tile `index` in plain order: r(r+1)/2 <= index < (r+1)(r+2)/2."""
    return _corrected(((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32), index)


@triton.jit
def _corrected(row, index):
    """tl.sqrt is approximate, so the row may be off by one to either side."""
    row += (index >= (row + 1) * (row + 2) // 2).to(tl.int32)
    row -= (index < row * (row + 1) // 2).to(tl.int32)
    return row


@triton.jit
def rectangle(index, rows, columns, GROUP: tl.constexpr):
    """Tile `index` of `rows` x `columns` tiles: (row, column), in bands of GROUP tile rows."""
    start = index // (GROUP * columns) * GROUP
    index -= start * columns
    height = tl.minimum(rows - start, GROUP)
    return start + index % height, index // height


def triangle_py(index: int, tiles: int, group: int) -> tuple[int, int]:
    """`triangle` in plain Python."""
    start = _triangle_row_py(index) // group * group
    index -= start * (start + 1) // 2
    height = min(tiles - start, group)
    if index < height * start:
        return start + index % height, index // height
    corner = index - height * start
    row = _triangle_row_py(corner)
    return start + row, start + corner - row * (row + 1) // 2


def _triangle_row_py(index: int) -> int:
    return (math.isqrt(8 * index + 1) - 1) // 2


def rectangle_py(index: int, rows: int, columns: int, group: int) -> tuple[int, int]:
    """`rectangle` in plain Python."""
    start = index // (group * columns) * group
    index -= start * columns
    height = min(rows - start, group)
    return start + index % height, index // height
