"""The emulated twins of the tensor-core instructions against what the PTX manual says of them: the
fragments of mma.m16n8k8 (.tf32) and cvt.rna.tf32."""

import emulation
import pytest
import torch

pytestmark = emulation.needs_compiler
LANES = range(32)


@pytest.fixture(scope="module")
def mma(tmp_path_factory):
    program = emulation.build(tmp_path_factory.mktemp("mma"), "mma")

    def run(a, b, d):
        shape = (torch.float32, (32, 4))
        return emulation.call(program, torch.float32, (), emulation.raw(a, b, d), shape, shape)

    return run


def spread(matrix, places):
    """The fragments (32, registers) of a matrix: places(lane, register) -> (row, column)."""
    count = matrix.numel() // 32
    rows = [[matrix[places(lane, e)] for e in range(count)] for lane in LANES]
    return torch.tensor(rows, dtype=torch.float32)


# PTX ISA, "Matrix Fragments for mma.m16n8k8", .tf32, in its words: groupID = %laneid >> 2,
# threadID_in_group = %laneid % 4.
def place_a(lane, i):  # row: groupID for a0, a2, + 8 for a1, a3; col: threadID, + 4 for a2, a3
    return (lane >> 2) + (8 if i in (1, 3) else 0), lane % 4 + (4 if i in (2, 3) else 0)


def place_b(lane, i):  # row: threadID for b0, + 4 for b1; col: groupID
    return lane % 4 + (4 if i == 1 else 0), lane >> 2


def place_c(lane, i):  # row: groupID for c0, c1, + 8 for c2, c3; col: threadID * 2 + (i & 1)
    return (lane >> 2) + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


def test_every_place_has_one_holder():
    for places, shape, count in (
        (place_a, (16, 8), 4),
        (place_b, (8, 8), 2),
        (place_c, (16, 8), 4),
    ):
        held = {places(lane, i) for lane in LANES for i in range(count)}
        assert held == {(r, c) for r in range(shape[0]) for c in range(shape[1])}


def test_fragments(mma):
    """Integers, exact in tf32 and in the sums: every element of D is right, so every place is."""
    generator = torch.Generator().manual_seed(0)
    A, B, C = (torch.randint(-9, 10, s, generator=generator) for s in ((16, 8), (8, 8), (16, 8)))
    D, _ = mma(spread(A, place_a), spread(B, place_b), spread(C, place_c))
    assert torch.equal(D, spread(A @ B + C, place_c))


def test_tf32_rounds_to_nearest_ties_away(mma):
    step = 2.0**-10
    inf, nan = float("inf"), float("nan")
    ties = [1 + step / 2, 1 + 0.499 * step, -1 - step / 2, 1 + 1.5 * step, 2 - 2.0**-23]
    numbers = torch.tensor([*ties, inf, -inf, nan])
    expected = torch.tensor([1 + step, 1, -1 - step, 1 + 2 * step, 2, inf, -inf, nan])
    A = torch.zeros(32, 4)
    A.view(-1)[: len(numbers)] = numbers
    _, rounded = mma(A, torch.zeros(32, 2), torch.zeros(32, 4))
    found = rounded.view(-1)[: len(numbers)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_an_operand_that_is_not_finite_reaches_its_row_alone(mma):
    A, B = torch.ones(16, 8), torch.ones(8, 8)
    A[3, 5] = torch.nan
    D, _ = mma(spread(A, place_a), spread(B, place_b), torch.zeros(32, 4))
    expected = A @ B
    torch.testing.assert_close(D, spread(expected, place_c), rtol=0, atol=0, equal_nan=True)
