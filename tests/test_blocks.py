"""Cutting parameters into blocks: every element belongs to exactly one block."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shampoo_kernels.optim.blocks import cut, matrix_shape, stack_blocks

SHAPES = st.lists(st.integers(0, 13), max_size=4).map(tuple)
ROOTS = st.tuples(st.sampled_from([None, 1, 2]), st.sampled_from([None, 2, 4]))


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((), (1, 1)),
        ((5,), (1, 5)),
        ((1, 5), (1, 5)),
        ((5, 1), (1, 5)),
        ((4, 6), (4, 6)),
        ((64, 3, 3, 3), (64, 27)),
        ((64, 32, 1, 1), (64, 32)),
        ((64, 1, 3, 3), (64, 9)),
        ((1, 4, 1, 6), (4, 6)),
        ((0, 3), (0, 3)),
    ],
)
def test_matrix_shape(shape, matrix):
    assert matrix_shape(shape) == matrix


@settings(deadline=None)
@given(SHAPES, ROOTS, st.integers(1, 6), st.integers(1, 40))
def test_blocks_tile_every_parameter_once(shape, p, block_size, max_dimension):
    one = cut(shape, p, block_size, max_dimension)
    assert math.prod(one.matrix) == math.prod(shape)
    counts = torch.zeros(one.matrix, dtype=torch.int64)
    for rows, cols in one.pieces:
        counts[rows, cols] += 1
    assert torch.all(counts == 1)


@settings(deadline=None)
@given(SHAPES, ROOTS, st.integers(1, 6), st.integers(1, 40))
def test_factored_sides_are_at_most_a_block_long_and_others_are_whole(
    shape, p, block_size, max_dimension
):
    one = cut(shape, p, block_size, max_dimension)
    m, n = matrix_shape(shape)
    for axis, (side, size, root) in enumerate((("left", m, p[0]), ("right", n, p[1]))):
        lengths = {piece[axis].stop - piece[axis].start for piece in one.pieces}
        if side in one.sides:
            assert root is not None
            assert size <= max_dimension
            assert max(lengths, default=0) <= block_size
        elif one.sides and one.pieces:
            assert lengths == {size}
    if m > 1 and n > 0 and all(root is not None for root in p) and max(m, n) <= max_dimension:
        assert one.sides == ("left", "right")


def test_sides_are_split_row_by_row():
    one = cut((10, 7), (2, 2), 4, 100)
    assert [(r.stop - r.start, c.stop - c.start) for r, c in one.pieces] == [
        (4, 4), (4, 3), (4, 4), (4, 3), (2, 4), (2, 3)
    ]  # fmt: skip


@settings(deadline=None)
@given(st.integers(2, 5000), st.integers(1, 1100))
@example(1025, 1024)
@example(4097, 1024)
def test_a_side_is_split_in_as_few_and_as_equal_pieces_as_can_be(size, block_size):
    """All but the last are equal, as stacks want it; each is short of block_size by little."""
    pieces = [rows for rows, _ in cut((size, 2), (2, None), block_size, 10**4).pieces]
    lengths = [rows.stop - rows.start for rows in pieces]
    assert len(set(lengths[:-1])) <= 1
    assert 0 <= lengths[0] - lengths[-1] < len(lengths)
    assert len(lengths) == -(-size // lengths[0])
    assert lengths[0] == -(-size // -(-size // block_size)) <= block_size


def test_a_side_over_max_dimension_is_neither_factored_nor_split():
    one = cut((50, 6), (2, 2), 4, 20)
    assert one.sides == ("right",)
    assert one.pieces == ((slice(0, 50), slice(0, 3)), (slice(0, 50), slice(3, 6)))
    assert cut((50, 60), (2, 2), 4, 20).sides == ()


def test_without_a_factor_a_parameter_is_one_row():
    assert cut((4, 6), (None, None), 2, 100).matrix == (1, 24)
    assert cut((4, 6), (None, None), 2, 100).pieces == ((slice(0, 1), slice(0, 24)),)


@settings(deadline=None)
@given(st.lists(SHAPES, max_size=6), st.integers(1, 6))
def test_stacks_hold_every_block_once_and_only_equal_ones(shapes, block_size):
    cuts = [cut(shape, (2, 2), block_size, 100) for shape in shapes]
    rest = [len(shape) % 2 for shape in shapes]
    stacks = stack_blocks(cuts, rest)
    found = [(b.parameter, b.index) for blocks in stacks.values() for b in blocks]
    assert sorted(found) == [(i, j) for i, one in enumerate(cuts) for j in range(len(one.pieces))]
    for key, blocks in stacks.items():
        for block in blocks:
            size = (block.rows.stop - block.rows.start, block.cols.stop - block.cols.start)
            assert size == (key.m, key.n)
            assert cuts[block.parameter].sides == key.sides
            assert rest[block.parameter] == key.rest
        assert [b.parameter for b in blocks] == sorted(b.parameter for b in blocks)
