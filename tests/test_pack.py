"""Pieces: every dtype and stride against torch, by the reference, the native kernel, and pack.cu in
emulation; factors that are zero read nothing; bounds."""

import itertools
import math

import emulation
import pytest
import torch

from shampoo_kernels import native, use_backend
from shampoo_kernels.ops.pack import Pieces

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ["reference", *(["native"] if native.lib else [])]
NAN = math.nan


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


def layouts(x):
    """x (m, n) contiguous, transposed, inside of a larger matrix, with steps, shifted by one."""
    m, n = x.shape
    yield x.clone()
    yield x.mT.contiguous().mT
    for rows, columns in ((slice(1, m + 1), slice(3, n + 3)), (slice(m), slice(1, 2 * n + 1, 2))):
        frame = torch.full((m + 3, 2 * n + 5), NAN, dtype=x.dtype)
        frame[rows, columns] = x
        yield frame[rows, columns]
    yield torch.empty(m * n + 1, dtype=x.dtype)[1:].view(m, n).copy_(x)


SHAPES = (1, 1), (3, 5), (7, 8), (96, 100), (1, 8195)


def everything(shapes=SHAPES, every=1):
    """(data, packed): all layouts and dtypes of pieces, packed into float32 and into their own."""
    data = [
        view for shape, dtype in itertools.product(shapes, FLOATS)
        for view in layouts(special(*shape, dtype=dtype))
    ][::every]  # fmt: skip
    kinds = [torch.float32 if i % 2 else FLOATS[i // 2 % 4] for i in range(len(data))]
    packed = [torch.full(x.shape, NAN, dtype=k) for x, k in zip(data, kinds, strict=True)]
    return data, packed


def check_same(results, expected):
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)


class Emulated:
    """pack.cu on a copy of the memory of all pieces, laid out end to end, 16 bytes apart."""

    def __init__(self, program, pieces):
        self.program, self.pieces = program, pieces
        offset, table = 0, pieces.table[0].clone()
        self.spans = []
        for row, (piece, place) in zip(
            table, zip(pieces.data, pieces.packed, strict=True), strict=True
        ):
            for column, tensor in enumerate((piece, place)):
                storage = tensor.untyped_storage()
                start = tensor.storage_offset() * tensor.element_size()
                row[column] = offset + start
                self.spans.append((tensor, offset, storage))
                offset += -(-storage.nbytes() // 16) * 16
        self.table, self.size = table, offset

    def run(self, unpack, factors=()):
        memory = bytearray(self.size)
        for _, offset, storage in self.spans:
            memory[offset : offset + storage.nbytes()] = bytes(storage)
        chunks = self.pieces.table[1]
        dtype = factors[0].dtype if factors else torch.float32
        sizes = unpack, bool(factors), self.size, len(self.table), len(chunks)
        data = bytes(memory) + emulation.raw(self.table, chunks, *factors)
        shape = (torch.uint8, (self.size,))
        (memory,) = emulation.call(self.program, dtype, sizes, data, shape)
        for _, offset, storage in self.spans:
            raw = torch.empty(0, dtype=torch.uint8).set_(storage)
            raw.copy_(memory[offset : offset + storage.nbytes()])

    def pack_(self):
        self.run(False)

    def unpack_(self):
        self.run(True)

    def apply_(self, decay, step):
        self.run(True, (decay, step))


@pytest.fixture(params=[*BACKENDS, pytest.param("emulated", marks=emulation.needs_compiler)])
def made(request):
    """A function (data, packed) -> something with pack_, unpack_ and apply_."""
    if request.param == "emulated":
        program = request.getfixturevalue("program")
        yield lambda data, packed: Emulated(program, Pieces(data, packed))
    else:
        with use_backend(request.param):
            yield Pieces


@pytest.fixture
def every(made):
    """A thread block takes long in emulation: one piece in seven there."""
    return 1 if made is Pieces else 7


def test_pack(made, every):
    data, packed = everything(every=every)
    before = [x.clone() for x in data]
    made(data, packed).pack_()
    # A float64 number goes to 16 bits by way of float32, as in torch's own copies.
    check_same(packed, [x.float().to(p.dtype) if x.dtype == torch.float64 and p.dtype.itemsize == 2
                        else x.to(p.dtype) for x, p in zip(data, packed, strict=True)])  # fmt: skip
    check_same(data, before)


def test_unpack(made, every):
    data, packed = everything(every=every)
    for x, p in zip(data, packed, strict=True):
        p.copy_(special(*x.shape, dtype=p.dtype))
    made(data, packed).unpack_()
    check_same(data, [p.to(x.dtype) for x, p in zip(data, packed, strict=True)])


def test_what_lies_around_a_piece_stays(made):
    frame = torch.arange(100.0).view(10, 10)
    before, inside = frame.clone(), frame[2:7, 3:8]
    made([inside], [torch.zeros(5, 5)]).unpack_()
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
    packed = [torch.randn(x.shape).to(FLOATS[i % 3]) for i, x in enumerate(data)]
    pieces = made(data, packed)
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
    packed = [torch.full((4, 6), v) for v in (5.0, NAN, NAN, NAN)]
    data[2].view(torch.int32)[0, 0] = 0x7FC12345  # stays bit for bit
    before = data[2].clone()
    decay, step = torch.tensor([0.0, 0.5, 1.0, 0.0]), torch.tensor([2.0, 0.0, 0.0, 0.0])
    made(data, packed).apply_(decay, step)
    assert (data[0] == 10).all()
    assert (data[1] == 1).all()
    assert torch.equal(data[2].view(torch.int32), before.view(torch.int32))
    assert (data[3] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend):
    with use_backend(backend):
        for pieces in (Pieces([], []), Pieces([torch.empty(0, 4)], [torch.empty(0, 4)])):
            pieces.pack_()
            pieces.unpack_()
            count = len(pieces.data)
            pieces.apply_(torch.ones(count), torch.ones(count))


@emulation.needs_compiler
@pytest.mark.parametrize("flags", [emulation.THREADS, emulation.ADDRESSES], ids=["races", "bounds"])
def test_sanitizers_find_nothing(tmp_path, flags):
    program = emulation.build(tmp_path, "pack", flags)
    data, packed = everything(((3, 5), (7, 8), (96, 100)), every=11)
    Emulated(program, Pieces(data, packed)).pack_()
    factors = torch.full((len(data),), 0.5, dtype=torch.float64)
    Emulated(program, Pieces(data, packed)).apply_(factors, factors)


@emulation.needs_compiler
def test_a_planted_overrun_is_found(tmp_path):
    """The piece at the end of the memory, whose last chunk writes four elements too many."""
    wrong = "size - first < kChunkElements ? size - first + 4"
    csrc = emulation.planted(tmp_path, "pack.cu", "size - first < kChunkElements ? size - first",
                             wrong)  # fmt: skip
    program = emulation.build(tmp_path, "pack", emulation.ADDRESSES, csrc)
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        Emulated(program, Pieces([torch.ones(4, 4)], [torch.ones(4, 4)])).pack_()


def test_errors():
    A = torch.ones(2, 3)
    for data, packed, error, words in (
        ([A], [], ValueError, "got 1 pieces and 0 places"),
        ([A.int()], [A], TypeError, "a piece must be float64 or"),
        ([A], [A.mT], ValueError, r"a packed piece must be \(2, 3\) as its piece, got \(3, 2\)"),
        ([A[0]], [A[0]], ValueError, r"a piece must be \(m, n\), got \(3,\)"),
        ([A], [A.mT.contiguous().mT], ValueError, "must be contiguous"),
    ):
        with pytest.raises(error, match=words):
            Pieces(data, packed)
    pieces = Pieces([A], [A.clone()])
    with pytest.raises(ValueError, match=r"step must be \(1,\) one for each piece, got \(2,\)"):
        pieces.apply_(torch.ones(1), torch.ones(2))
    with pytest.raises(TypeError, match="decay must be float32"):
        pieces.apply_(torch.ones(1).double(), torch.ones(1))
