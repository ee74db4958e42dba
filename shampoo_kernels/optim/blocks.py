"""How parameters are cut into blocks, and how blocks of one shape are put together.

Everything here is a function of the *global* shapes alone: no tensors, no devices, no ranks.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

LEFT, RIGHT = "left", "right"


@dataclass(frozen=True)
class Cut:
    """One parameter as a matrix (m, n), the sides with a factor, its pieces (rows, columns)."""

    matrix: tuple[int, int]
    sides: tuple[str, ...]
    pieces: tuple[tuple[slice, slice], ...]


@dataclass(frozen=True)
class Block:
    """One m x n piece of one parameter; `index` counts the pieces of that parameter."""

    parameter: int
    index: int
    rows: slice
    cols: slice


class StackKey(NamedTuple):
    """What blocks must have in common to be one tensor (B, m, n)."""

    m: int
    n: int
    sides: tuple[str, ...]
    rest: Any  # whatever else must agree: hashable


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Drop dimensions of size 1, then first dimension x all others: (64, 3, 3, 3) -> (64, 27).

    Scalars and vectors become one row (1, n).
    """
    wide = [size for size in shape if size != 1]
    if len(wide) < 2:
        return 1, math.prod(wide)
    return wide[0], math.prod(wide[1:])


def cut(
    shape: Sequence[int],
    p: tuple[float | None, float | None],
    block_size: int,
    max_dimension: int,
    split: tuple[int, int] = (1, 1),
    batch_dims: int = 0,
) -> Cut:
    """Cut a parameter of `shape` into blocks of at most block_size on each side with a factor.

    The first batch_dims dimensions count matrices, which stand one below the other; each is cut
    into split[0] x split[1] equal pieces, and these into blocks. A side of a piece has a factor
    when its p is not None and it is at most max_dimension long; a side without one is not cut
    further. Vectors, scalars, and matrices without any factor are one row.

    Raises:
        ValueError: `split` does not divide the matrix.
    """
    batch, (rows_each, cols_each) = math.prod(shape[:batch_dims]), matrix_shape(shape[batch_dims:])
    m, n = rows_each // split[0], cols_each // split[1]
    sides = tuple(
        side
        for side, size, root in ((LEFT, m, p[0]), (RIGHT, n, p[1]))
        if rows_each > 1 and root is not None and size <= max_dimension
    )
    if math.prod(shape) == 0:
        return Cut((batch * rows_each, cols_each), (), ())
    if not sides:
        size = math.prod(shape)
        return Cut((1, size), (), ((slice(0, 1), slice(0, size)),))
    if (rows_each, cols_each) != (m * split[0], n * split[1]):
        raise ValueError(
            f"Shampoo: split must divide the sides of a matrix ({rows_each}, {cols_each}), which a "
            f"parameter {tuple(shape)} is with batch_dims={batch_dims}, got {split}"
        )
    rows = _repeat(_split(m, block_size if LEFT in sides else m), batch * split[0], m)
    cols = _repeat(_split(n, block_size if RIGHT in sides else n), split[1], n)
    return Cut((batch * rows_each, cols_each), sides, tuple((r, c) for r in rows for c in cols))


def _repeat(pieces: list[slice], count: int, size: int) -> list[slice]:
    """The same pieces of each of `count` runs of `size`."""
    return [
        slice(start + piece.start, start + piece.stop)
        for start in range(0, count * size, size)
        for piece in pieces
    ]


def _split(size: int, piece: int) -> list[slice]:
    """[0, size) in as few pieces of at most `piece` as there can be, all but the last one equal.

    They are as equal as that allows: 1025 in pieces of 1024 is 513 + 512, not 1024 + 1.
    """
    count = math.ceil(size / piece)
    length = math.ceil(size / count)
    return [slice(start, min(start + length, size)) for start in range(0, size, length)]


def stack_blocks(cuts: Sequence[Cut], rest: Sequence[Hashable]) -> dict[StackKey, list[Block]]:
    """All blocks of `cuts`, grouped by shape, sides and rest[parameter], in order of parameters."""
    stacks: dict[StackKey, list[Block]] = {}
    for parameter, (one, extra) in enumerate(zip(cuts, rest, strict=True)):
        for index, (rows, cols) in enumerate(one.pieces):
            key = StackKey(rows.stop - rows.start, cols.stop - cols.start, one.sides, extra)
            stacks.setdefault(key, []).append(Block(parameter, index, rows, cols))
    return stacks
