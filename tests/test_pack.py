"""Pieces: every dtype and stride against torch, by the reference, the native kernel, and pack.cu in
emulation; which pieces are finite; factors that are zero read nothing; bounds."""

import itertools
import math
import types

import emulation
import pytest
import torch
from pieces import FLOATS, NAN, Emulated, layouts, places, stacks_for

from shampoo_kernels import native, use_backend
from shampoo_kernels.ops import pack
from shampoo_kernels.ops.pack import Pieces

BACKENDS = ["reference", *(["native"] if native.lib else [])]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return emulation.build(tmp_path_factory.mktemp("pack"), "pack")


def special(*shape, dtype):
    """Numbers of every size, ties, subnormals, overflow, Inf and NaN, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-9, 6, x.numel(), dtype=torch.float64).view(shape)
    some = [0.0, -0.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 65519.0, 65520.0, 2.0**-24,
            2.0**-25, 3 * 2.0**-26, 1e-40, 3e38, math.inf, -math.inf, NAN]  # fmt: skip
    x.view(-1)[: len(some)] = torch.tensor(some, dtype=torch.float64)[: x.numel()]
    return x.to(dtype)


SHAPES = (1, 1), (3, 5), (7, 8), (96, 100), (1, 8195)


def everything(shapes=SHAPES, every=1, of=special):
    """(data, stacks): all layouts and dtypes of pieces, packed into float32 and into others."""
    data = [
        view for shape, dtype in itertools.product(shapes, FLOATS)
        for view in layouts(of(*shape, dtype=dtype))
    ][::every]  # fmt: skip
    return data, stacks_for(data)


def cast(x, dtype):
    """A float64 number goes to 16 bits by way of float32, as in torch's own copies."""
    return x.float().to(dtype) if x.dtype == torch.float64 and dtype.itemsize == 2 else x.to(dtype)


def check_same(results, expected):
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(params=[*BACKENDS, pytest.param("emulated", marks=emulation.needs_compiler)])
def backend(request):
    return request.param


@pytest.fixture
def made(backend, request):
    """A function (data, stacks) -> something with pack_, unpack_, apply_ and pack_finite_."""
    if backend == "emulated":
        program = request.getfixturevalue("program")
        yield lambda data, stacks: Emulated(program, data, stacks)
    else:
        with use_backend(backend):
            yield Pieces


@pytest.fixture
def every(backend):
    """A thread block takes long in emulation: one piece in four there."""
    return 4 if backend == "emulated" else 1


def test_pack(made, every):
    data, stacks = everything(every=every)
    before = [x.clone() for x in data]
    made(data, stacks).pack_()
    packed = places(stacks)
    check_same(packed, [cast(x, p.dtype) for x, p in zip(data, packed, strict=True)])
    check_same(data, before)


def test_unpack(made, every):
    data, stacks = everything(every=every)
    for stack in stacks:
        stack.copy_(special(*stack.shape, dtype=stack.dtype))
    made(data, stacks).unpack_()
    check_same(data, [p.to(x.dtype) for x, p in zip(data, places(stacks), strict=True)])


def ordinary(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape))).to(dtype)


# What makes a piece not finite; the third is a number of which the square is none.
SICK = {
    torch.float32: (NAN, -math.inf, 1.9e19),
    torch.bfloat16: (NAN, -math.inf, -1.9e19),
    torch.float16: (NAN, -math.inf, math.inf),
    torch.float64: (NAN, -math.inf, 1.4e154),
}


@pytest.mark.parametrize("negate", [False, True])
def test_pack_finite(made, backend, every, negate):
    data, stacks = everything(every=every, of=ordinary)
    for k, x in enumerate(data):
        if k % 4 != 3:
            x[-1, -1 if k % 2 else 0] = SICK[x.dtype][k % 4]
    sick = torch.arange(len(data)) % 4 != 3
    before = [x.clone() for x in data]
    squares = made(data, stacks).pack_finite_(negate)
    packed = places(stacks)
    check_same(data, before)
    check_same(packed, [
        torch.zeros(p.shape, dtype=p.dtype) if bad else cast(-x if negate else x, p.dtype)
        for x, p, bad in zip(data, packed, sick, strict=True)
    ])  # fmt: skip
    assert squares.dtype == torch.float64
    assert torch.equal(squares.isfinite(), ~sick)
    for x, square, bad in zip(data, squares, sick, strict=True):
        exact = x.double().square().sum()
        # The kernels sum all squares in float64, the reference the rows, then their norms.
        unit, terms = 2.0**-53, x.numel()
        if backend == "reference":
            unit, terms = 2.0**-53 if x.dtype == torch.float64 else 2.0**-24, sum(x.shape)
        assert bad or (square - exact).abs() <= 2 * (terms + 4) * unit * exact


def test_pack_finite_to_the_limit(made):
    """The sum of the squares decides, not the largest, and not what the stack can hold."""
    edge = torch.finfo(torch.float32).max ** 0.5
    data = [torch.full((2, 2), f * edge / 2) for f in (0.99, 1.01)]
    data += [torch.full((2, 2), f * edge / 2).double() for f in (0.99, 1.01)]
    stacks = [torch.full((2, 2, 2), NAN), torch.full((2, 2, 2), NAN)]
    squares = made(data, stacks).pack_finite_()
    assert squares.isfinite().tolist() == [True, False, True, True]
    check_same(places(stacks), [data[0], torch.zeros(2, 2), data[2].float(), data[3].float()])


@pytest.mark.skipif(native.lib is None, reason="no native kernels")
def test_squares_do_not_depend_on_threads():
    data = [ordinary(m, n, dtype=torch.float32) for m, n in ((300, 1000), (1, 3), (999, 77))]
    stacks, before = [torch.empty_like(x)[None] for x in data], torch.get_num_threads()
    found = []
    try:
        with use_backend("native"):
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(Pieces(data, stacks).pack_finite_())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_lies_around_a_piece_stays(made):
    frame = torch.arange(100.0).view(10, 10)
    before, inside = frame.clone(), frame[2:7, 3:8]
    made([inside], [torch.zeros(1, 5, 5)]).unpack_()
    assert (inside == 0).all()
    inside.copy_(before[2:7, 3:8])
    assert torch.equal(frame, before)


@pytest.mark.parametrize("wide", [False, True])
def test_apply(made, every, wide):
    """Two roundings of the sum in float32, one fewer where multiply and add are fused, and one to
    the dtype of the weights."""
    shapes = ((3, 5), (7, 8), (96, 100))
    data = [
        view for shape, dtype in itertools.product(shapes, FLOATS[: 4 if wide else 3])
        for view in layouts(torch.randn(shape).to(dtype))
    ][::every]  # fmt: skip
    stacks = [torch.randn_like(s).to(FLOATS[i % 3]) for i, s in enumerate(stacks_for(data))]
    pieces, packed = made(data, stacks), places(stacks)
    dtype = torch.float64 if wide else torch.float32
    decay, step = torch.rand(len(data)).to(dtype), torch.randn(len(data)).to(dtype)
    expected = [
        d * x.double() + s * p.double()
        for d, s, x, p in zip(decay.double(), step.double(), data, packed, strict=True)
    ]
    sizes = [
        d * x.double().abs() + abs(s) * p.double().abs()
        for d, s, x, p in zip(decay.double(), step.double(), data, packed, strict=True)
    ]
    pieces.apply_(decay, step)
    for x, wanted, size in zip(data, expected, sizes, strict=True):
        own = torch.finfo(x.dtype).eps / 2 * wanted.abs()
        unit = 2.0**-52 if x.dtype == torch.float64 else 2.0**-23
        assert ((x.double() - wanted).abs() <= 1.01 * own + 2 * unit * size + 2.0**-25).all()


def test_factors_of_zero_read_nothing(made):
    data = [torch.full((4, 6), v) for v in (NAN, 2.0, NAN, 3.0)]
    stack = torch.tensor([5.0, NAN, NAN, NAN]).view(4, 1, 1).repeat(1, 4, 6)
    data[2].view(torch.int32)[0, 0] = 0x7FC12345  # stays bit for bit
    before = data[2].clone()
    decay, step = torch.tensor([0.0, 0.5, 1.0, 0.0]), torch.tensor([2.0, 0.0, 0.0, 0.0])
    made(data, [stack]).apply_(decay, step)
    assert (data[0] == 10).all()
    assert (data[1] == 1).all()
    assert torch.equal(data[2].view(torch.int32), before.view(torch.int32))
    assert (data[3] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shapes", [[], [(0, 2, 3)], [(1, 0, 4), (2, 4, 0)]])
def test_nothing_to_do(backend, shapes):
    stacks = [torch.empty(shape) for shape in shapes]
    pieces = Pieces([torch.empty_like(place) for place in places(stacks)], stacks)
    count = len(pieces.data)
    with use_backend(backend):
        pieces.pack_()
        pieces.unpack_()
        pieces.apply_(torch.ones(count), torch.ones(count))
        assert torch.equal(pieces.pack_finite_(), torch.zeros(count, dtype=torch.float64))


@emulation.needs_compiler
@pytest.mark.parametrize("flags", [emulation.THREADS, emulation.ADDRESSES], ids=["races", "bounds"])
def test_sanitizers_find_nothing(tmp_path, flags):
    program = emulation.build(tmp_path, "pack", flags)
    data, stacks = everything(((3, 5), (7, 8), (96, 100)), every=11)
    emulated = Emulated(program, data, stacks)
    emulated.pack_()
    emulated.pack_finite_(negate=True)
    factors = torch.full((len(data),), 0.5, dtype=torch.float64)
    emulated.apply_(factors, factors)


@emulation.needs_compiler
def test_a_planted_overrun_is_found(tmp_path):
    """The piece at the end of the memory, whose last chunk writes four elements too many."""
    wrong = "size - first < kChunkElements ? size - first + 4"
    csrc = emulation.planted(tmp_path, "pieces.h", "size - first < kChunkElements ? size - first",
                             wrong)  # fmt: skip
    program = emulation.build(tmp_path, "pack", emulation.ADDRESSES, csrc)
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        Emulated(program, [torch.ones(4, 4)], [torch.ones(1, 4, 4)]).pack_()


@emulation.needs_compiler
@pytest.mark.parametrize("flags", [emulation.PLAIN, emulation.ADDRESSES], ids=["", "bounds"])
def test_a_table_by_the_arguments_of_kernels(tmp_path, flags):
    program = emulation.build(tmp_path, "table", flags)
    for count in (0, 1, 447, 448, 449, 1300):
        table = torch.arange(count, dtype=torch.int64) * 2**40 - 7
        shape = torch.int64, (count,)
        written = emulation.call(program, torch.float64, (count,), emulation.raw(table), shape)[0]
        assert torch.equal(written, table)


@pytest.fixture
def captured(monkeypatch):
    """As while a CUDA graph is captured, on the CPU; the tables that were written."""
    written = []

    def write(to, table):
        assert table.is_cpu
        assert to.dtype == table.dtype == torch.int64
        written.append(to.copy_(table))

    monkeypatch.setattr(pack, "capturing", lambda device: True)
    monkeypatch.setattr(torch.ops.shampoo_kernels_native, "write_table_", write, raising=False)
    return written


@pytest.mark.skipif(native.lib is None, reason="no native kernels")
def test_a_captured_graph_has_tables_of_its_own(captured, monkeypatch):
    """The same ones, made anew for every launch and never kept for one outside of the graph."""
    sizes = (3, 5), (2, 9000), (0, 4), (1, 8192), (4, 0), (1, 8193)
    data = [ordinary(m, n, dtype=torch.float32) for m, n in sizes]
    stacks = [torch.empty_like(x)[None] for x in data]
    made = Pieces(data, stacks)
    tables = made.table
    assert [tuple(x.shape) for x in captured] == [(len(data), 8), (2, len(data))]
    assert made.table[0] is not tables[0]
    with use_backend("native"):
        made.pack_()
    assert len(captured) == 6
    check_same(places(stacks), data)
    with monkeypatch.context() as outside:
        outside.setattr(pack, "capturing", lambda device: False)
        own = made.table
        assert made.table[0] is own[0]
        for ours, theirs in zip(tables, own, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)  # dtype, shape, numbers
    assert made.table[0] is not own[0]


def test_capturing_is_asked_of_gpus_alone(monkeypatch):
    for now in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=now: now)
        assert pack.capturing(torch.device("cuda", 0)) == now
        assert not pack.capturing(torch.device("cpu"))


def test_tables_of_chunks_stay_on_their_stream(monkeypatch):
    """On another one the copy to the device might not be there yet."""
    device, streams = torch.device("cuda", 0), [1, 1, 2]
    monkeypatch.setattr(pack, "_move", lambda table, device: table)
    monkeypatch.setattr(pack, "capturing", lambda device: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(
        cuda_stream=streams.pop(0)))  # fmt: skip
    first, same, other = (pack.chunks((8193, 0, 5), device) for _ in range(3))
    pack._chunks.cache_clear()
    assert first.tolist() == [[0, 0], [0, 1], [2, 0]]
    assert first is same
    assert first is not other


def test_errors():
    A = torch.ones(2, 3)
    for data, stacks, error, words in (
        ([A], [], ValueError, "got 1 pieces and 0 places"),
        ([A], [A.new_empty(2, 2, 3)], ValueError, "got 1 pieces and 2 places"),
        ([A.int()], [A[None]], TypeError, "a piece must be float64 or"),
        ([A], [A[None].int()], TypeError, "a stack must be float64 or"),
        ([A, A.double()], [A.new_empty(2, 2, 3)], TypeError, "a piece must be float32, got"),
        ([A], [A.mT[None].contiguous()], ValueError,
         r"a piece must be \(3, 2\) as its place in a stack, got \(2, 3\)"),
        ([A[0]], [A[None]], ValueError, r"a piece must be \(2, 3\) as its place"),
        ([A, A], [A], ValueError, r"a stack must be \(b, m, n\), got \(2, 3\)"),
        ([A], [A.mT.contiguous().mT[None]], ValueError, "must be contiguous, got strides"),
        ([A.to("meta")], [A[None]], ValueError, "on one device, got meta and cpu"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            Pieces(data, stacks)
    pieces = Pieces([A], [A.clone()[None]])
    with pytest.raises(ValueError, match=r"step must be \(1,\) one for each piece, got \(2,\)"):
        pieces.apply_(torch.ones(1), torch.ones(2))
    with pytest.raises(TypeError, match="decay must be float32"):
        pieces.apply_(torch.ones(1).double(), torch.ones(1))
