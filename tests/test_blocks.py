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


def test_a_split_cuts_into_equal_pieces_before_blocks_are_cut():
    """A fused query, key and value, each of 10 rows in blocks of 4."""
    one = cut((30, 7), (2, 2), 4, 100, split=(3, 1))
    assert one.matrix == (30, 7)
    assert [r.start for r, c in one.pieces if c.start == 0] == [0, 4, 8, 10, 14, 18, 20, 24, 28]
    assert [r.stop for r, c in one.pieces if c.start == 0] == [4, 8, 10, 14, 18, 20, 24, 28, 30]
    columns = cut((6, 8), (2, 2), 100, 100, split=(1, 2)).pieces
    assert columns == ((slice(0, 6), slice(0, 4)), (slice(0, 6), slice(4, 8)))


def test_max_dimension_is_that_of_a_piece():
    assert cut((30, 7), (2, 2), 100, 10, split=(3, 1)).sides == ("left", "right")
    assert cut((30, 7), (2, 2), 100, 10).sides == ("right",)


def test_the_first_dimensions_may_count_matrices():
    one = cut((3, 4, 5), (2, 2), 100, 100, batch_dims=1)
    assert one.matrix == (12, 5)
    assert one.pieces == tuple((slice(i, i + 4), slice(0, 5)) for i in (0, 4, 8))
    assert cut((2, 3, 4, 5), (2, 2), 100, 100, batch_dims=2).matrix == (24, 5)
    assert cut((3, 4, 5), (2, 2), 100, 100, (2, 1), 1).pieces[1] == (slice(2, 4), slice(0, 5))
    assert cut((3, 5), (2, 2), 100, 100, batch_dims=1).matrix == (1, 15)  # a stack of vectors


@pytest.mark.parametrize("shape", [(10, 7), (3, 10, 7)])
def test_a_split_that_does_not_divide_is_refused(shape):
    with pytest.raises(
        ValueError, match=r"^Shampoo: split must divide .* \(10, 7\).* got \(3, 1\)"
    ):
        cut(shape, (2, 2), 4, 100, (3, 1), len(shape) - 2)
    assert cut((10,), (2, 2), 4, 100, (3, 1)).sides == ()  # the bias beside it has no blocks


@settings(deadline=None)
@given(
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)),
    ROOTS, st.tuples(st.integers(1, 3), st.integers(1, 3)), st.integers(0, 2), st.integers(1, 5),
)  # fmt: skip
def test_split_blocks_tile_every_parameter_once(shape, p, split, batch_dims, block_size):
    try:
        one = cut(shape, p, block_size, 100, split, batch_dims)
    except ValueError:
        m, n = matrix_shape(shape[batch_dims:])
        assert m % split[0] or n % split[1]
        return
    counts = torch.zeros(one.matrix, dtype=torch.int64)
    for rows, cols in one.pieces:
        counts[rows, cols] += 1
    assert torch.all(counts == 1)
    assert math.prod(one.matrix) == math.prod(shape)
