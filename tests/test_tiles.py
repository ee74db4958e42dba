"""The tile maps: every tile, and so every element, is owned once; kernels and Python agree."""

import interpreted  # noqa: F401  (first: it chooses the interpreter)
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from shampoo_kernels.kernels import tiles

GROUPS = [1, 3, 8]


@triton.jit
def map_kernel(out, rows, columns, count, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """All indices at once: the maps work on tensors of indices as they do on one."""
    entry = tl.arange(0, SIZE)
    index = tl.minimum(entry, count - 1)
    if columns == 0:
        row, column = tiles.triangle(index, rows, GROUP)
    else:
        row, column = tiles.rectangle(index, rows, columns, GROUP)
    tl.store(out + entry * 2, row, mask=entry < count)
    tl.store(out + entry * 2 + 1, column, mask=entry < count)


def mapped(rows, columns, group):
    count = rows * columns if columns else rows * (rows + 1) // 2
    out = torch.full((count, 2), -1, dtype=torch.int32)
    map_kernel[(1,)](out, rows, columns, count, triton.next_power_of_2(count), group)
    return out.numpy()


@pytest.mark.parametrize("group", GROUPS)
def test_every_element_of_every_triangle_to_2000_is_owned_once(group):
    """With tiles of 16, the smallest that tl.dot takes, n = 2000 has 125 tile rows, and an element
    (i, j <= i) belongs to tile (i // 16, j // 16); so do the larger tiles with fewer rows."""
    for rows in range(1, 126):
        count = rows * (rows + 1) // 2
        pairs = [tiles.triangle_py(index, rows, group) for index in range(count)]
        assert len(set(pairs)) == count
        assert all(0 <= column <= row < rows for row, column in pairs)


@pytest.mark.parametrize(("n", "block"), [(1, 16), (33, 16), (97, 32), (130, 64), (300, 128)])
def test_elements_written_and_mirrored_cover_the_square(n, block):
    """The same with elements: once in the lower triangle, once in the upper one by the mirror."""
    rows = -(-n // block)
    owners = np.zeros((n, n), dtype=int)
    for index in range(rows * (rows + 1) // 2):
        row, column = (x * block for x in tiles.triangle_py(index, rows, 8))
        owners[row : row + block, column : column + block] += 1
        if row != column:
            owners[column : column + block, row : row + block] += 1
    assert (owners == 1).all()


@pytest.mark.parametrize("group", GROUPS)
def test_the_kernels_triangle_is_pythons(group):
    for rows in range(1, 126):
        count = rows * (rows + 1) // 2
        expected = [tiles.triangle_py(index, rows, group) for index in range(count)]
        assert np.array_equal(mapped(rows, 0, group), expected)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (7, 1), (8, 5), (13, 11), (40, 30)])
def test_rectangles(rows, columns, group):
    found = mapped(rows, columns, group)
    expected = [tiles.rectangle_py(index, rows, columns, group) for index in range(rows * columns)]
    assert np.array_equal(found, expected)
    assert sorted(map(tuple, found.tolist())) == [
        (row, column) for row in range(rows) for column in range(columns)
    ]


def test_an_inexact_square_root_is_corrected():
    """A GPU's square root is off by some units in the last place: the row is then off by one at the
    most, and from there it is corrected. 2^22 tiles are the triangle of a matrix of 185,000 rows.
    """
    corners = np.array([row * (row + 1) // 2 for row in range(1, 2896)])
    index = np.concatenate([np.arange(200), corners, corners - 1, [2**22]])
    exact = np.array([tiles._triangle_row_py(int(i)) for i in index])
    root = np.sqrt(np.float32(8) * index.astype(np.float32) + np.float32(1))
    for error in (-4e-7, 4e-7):
        row = ((root * np.float32(1 + error) - 1) * np.float32(0.5)).astype(int)
        assert abs(row - exact).max() <= 1
    out = torch.empty(len(index), dtype=torch.int32)
    for off in (-1, 0, 1):
        rows, indices = (torch.from_numpy(x).int() for x in (exact + off, index))
        correct_kernel[(1,)](out, rows, indices, len(index), 8192)
        assert np.array_equal(out.numpy(), exact)


@triton.jit
def correct_kernel(out, rows, indices, count, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    row, index = tl.load(rows + i, mask=i < count), tl.load(indices + i, mask=i < count)
    tl.store(out + i, tiles._corrected(row, index), mask=i < count)


def test_groups_share_operands():
    """A wave of 132 programs of a 64 x 64 triangle meets far fewer tile rows than ungrouped."""

    def operands(group):
        wave = [tiles.triangle_py(index, 64, group) for index in range(1500, 1632)]
        return len({x for pair in wave for x in pair})

    assert operands(8) <= 0.6 * operands(1)
