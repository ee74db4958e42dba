"""What is written must not overlap itself or what is read: exact, against marking every byte."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shampoo_kernels import gram_ema_, inverse_root, precondition
from shampoo_kernels.ops.overlap import check_apart, check_same_or_apart

ops = torch.ops.shampoo_kernels


def overlap(A, B):
    return refused("must not overlap B", A, B=B)


def refused(words, A, **read):
    try:
        check_apart("op", "A", A, **read)
    except ValueError as error:
        return words in str(error)
    return False


def addresses(A):
    """Every byte of A, one entry for every element that it belongs to."""
    found = [A.data_ptr()]
    for n, stride in zip(A.shape, A.stride(), strict=True):
        found = [x + i * stride * A.itemsize for x in found for i in range(n)]
    return [x + i for x in found for i in range(A.itemsize)]


S = torch.zeros(6, 4, 8)
APART = {
    "alternating blocks": (S[0::2], S[1::2]),
    "every third": (S[1::3], S[2::3]),
    "halves of rows": (S[:, :2], S[:, 2:]),
    "halves of columns": (S[:, :, :4], S[:, :, 4:]),
    "alternating columns": (S[..., ::2], S[..., 1::2]),
    "columns, transposed": (S[..., ::2].mT, S[:, ::2, 1::2]),
    "a chessboard": (S[:, ::2, ::2], S[:, 1::2, 1::2]),
    "a diagonal and what is beside": (S[0, :, :4].diagonal(), S[0, :, :4].diagonal(1)),
    "an empty slice": (S[:3], S[1:1]),
    "another storage": (S, torch.zeros(6, 4, 8)),
    "parts of a float64": (S.view(torch.float64)[..., :2], S[..., 4:]),
}
OVERLAPPING = {
    "itself": (S, S),
    "a shifted slice": (S[:3], S[2:5]),
    "the last element": (S.view(-1)[:8], S.view(-1)[7:]),
    "a row and a column": (S[0, 1], S[0, :, 3]),
    "steps of 2 and 3": (S.view(-1)[::2], S.view(-1)[3::3]),
    "a transpose": (S[:, :, :4], S[:, :, :4].mT),
    "expanded": (S, S[5, 3, 7].expand(6, 4, 8)),
    "bytes of an element": (S, S.view(torch.int8)[..., 5::32]),
    "half of a float64": (S.view(torch.float64)[..., :2], S[..., 3:]),
}


@pytest.mark.parametrize("name", APART)
def test_apart(name):
    A, B = APART[name]
    assert not overlap(A, B)
    assert not overlap(B, A)


@pytest.mark.parametrize("name", OVERLAPPING)
def test_overlapping(name):
    A, B = OVERLAPPING[name]
    assert overlap(A, B)


@st.composite
def views(draw):
    """A slice of a (3, 5, 7) float32 or int16 tensor, permuted."""
    memory = torch.zeros(3, 5, 14, dtype=torch.int16)
    A = memory if draw(st.booleans()) else memory.view(torch.float32)
    for dim in range(3):
        n = A.shape[dim]
        start, step = draw(st.integers(0, n - 1)), draw(st.integers(1, 4))
        length = draw(st.integers(1, n - start))
        index = [slice(None)] * 3
        index[dim] = slice(start, start + length, step)
        A = A[tuple(index)]
    order = draw(st.permutations(range(3)))
    return A.storage_offset(), A.permute(*order).stride(), A.permute(*order).shape, A.dtype


@settings(max_examples=400, deadline=None)
@given(views(), views())
def test_slices_are_judged_exactly(first, second):
    memory = torch.zeros(3 * 5 * 14, dtype=torch.int16)
    A, B = (
        memory.view(dtype).as_strided(shape, stride, offset)
        for offset, stride, shape, dtype in (first, second)
    )
    assert overlap(A, B) == bool(set(addresses(A)) & set(addresses(B)))


@settings(max_examples=300, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    strides=st.lists(st.integers(0, 20), min_size=4, max_size=4),
)
def test_what_overlaps_itself_is_refused(shape, strides):
    """Always; of what does not, only strides that do not nest are."""
    A = torch.zeros(1000).as_strided(shape, strides[: len(shape)])
    refuses = refused("must not overlap itself", A)
    twice = len(set(addresses(A))) < A.nbytes
    reaches = [0]
    dimensions = sorted((s, n) for s, n in zip(A.stride(), A.shape, strict=True) if n > 1)
    for stride, n in dimensions:
        reaches.append(reaches[-1] + stride * (n - 1))
    nested = all(stride > reach for (stride, _), reach in zip(dimensions, reaches, strict=False))
    assert refuses or not twice
    assert not (refuses and nested)


def test_a_long_search_ends_as_an_overlap():
    """No sum of even strides reaches an odd element, but there are 9^6 of them to try."""
    strides = (30_000, 29_998, 29_986, 29_974, 29_958, 29_936)
    memory = torch.empty(1_500_000)
    scattered = memory.as_strided((9,) * 6, strides)
    assert overlap(memory[700_001:][:1], scattered)
    assert not overlap(memory[700_001:][:1], scattered[..., :1, :1, :1, :1])


def test_the_same_or_apart():
    for same in (S, S.view(6, 4, 8), S.as_strided((6, 4, 8), S.stride())):
        check_same_or_apart("op", "A", S, B=same)
    one = S[:1]  # the stride of a dimension of one element says nothing
    check_same_or_apart("op", "A", one, B=one.as_strided(one.shape, (5, *one.stride()[1:])))
    check_same_or_apart("op", "A", S[0::2], B=S[1::2])
    check_same_or_apart("op", "A", S, B=None)
    square = S[:, :, :4]
    for other in (square.mT, S[:, :, 1:5], square[:, :2], S[:5, :, :4]):
        with pytest.raises(ValueError, match="A is written in place and must not overlap B"):
            check_same_or_apart("op", "A", square, B=other)


def spd(batch, n):
    G = torch.randn(batch, n, 2 * n, generator=torch.Generator().manual_seed(n))
    return G @ G.mT / n


def gram_cases():
    room = torch.zeros(4, 8, 8)
    stat, grad = room[:2, :4, :4], torch.ones(2, 4, 4)
    options = {"side": "left"}
    return {
        "grad": lambda: gram_ema_(stat, room[:2, 1:5, 1:5], 0.5, 0.5, **options),
        "weight": lambda: gram_ema_(stat, grad, 0.5, 0.5, weight=room[1:3, :4, :4], **options),
        "beta": lambda: gram_ema_(stat, grad, room[:2, 1, 1], 0.5, **options),
        "alpha": lambda: gram_ema_(stat, grad, 0.5, room[1, 0, 0], **options),
        "itself": lambda: gram_ema_(room.as_strided((2, 4, 4), (3, 4, 1)), grad, 0, 1, **options),
    }


def other_cases():
    room, A = torch.zeros(4, 8, 8), spd(2, 4)
    grad, out = torch.ones(2, 4, 4), room[:2, :4, :4]
    results = torch.zeros(2), torch.zeros(2, dtype=torch.int8)
    bytes_of_out = room.view(torch.int8)[:2, 0, 0]
    return {
        "grad": lambda: precondition(room[:2, 3:7, 3:7], None, A, out=out),
        "left": lambda: precondition(grad, room[1:3, :4, :4], None, out=out),
        "right": lambda: precondition(grad, A, room[:2, :4, 2:6], out=out),
        "A": lambda: inverse_root(room[:2, 2:6, 2:6], 2, out=out),
        "previous": lambda: inverse_root(A, 2, previous=room[:2, 2:6, 2:6], out=out),
        "itself": lambda: inverse_root(A, 2, out=room.as_strided((2, 4, 4), (8, 3, 1))),
        "residual": lambda: ops.inverse_root_(out, room[:2, 0, 0], results[1], A, 2.0),
        "status": lambda: ops.inverse_root_(out, results[0], bytes_of_out, A, 2.0),
    }


@pytest.mark.parametrize("cases", [gram_cases, other_cases])
def test_ops_refuse_overlap(cases):
    for name, call in cases().items():
        with pytest.raises(ValueError, match=f"must not overlap {name}"):
            call()


def test_ops_take_interleaved_views():
    """Every other block of a stack, read and written: as with copies."""
    stack, A = spd(6, 5), spd(3, 5)
    grad, expected = stack[1::2].clone(), stack[0::2].clone()
    gram_ema_(expected, grad, 0.5, 0.5, side="left")
    gram_ema_(stack[0::2], stack[1::2], 0.5, 0.5, side="left")
    assert torch.equal(stack[0::2], expected)
    assert torch.equal(stack[1::2], grad)
    precondition(stack[1::2], None, A, out=stack[0::2])
    torch.testing.assert_close(stack[0::2], grad @ A)
    wide = torch.zeros(3, 5, 10)
    wide[..., :5] = A
    inverse_root(wide[..., :5], 2, previous=wide[..., 5:], out=wide[..., 5:])
    torch.testing.assert_close(wide[..., 5:], inverse_root(A, 2).root)
