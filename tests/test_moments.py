"""moments_ against its formulas in float64: every graft, layout and dtype, by the reference, the
native kernel, and moments.cu in emulation; blocks that stand still; bits."""

import itertools
import math
from typing import NamedTuple

import emulation
import pytest
import torch
from moment_law import check_near, restated
from pieces import Memory, layouts
from torch import Tensor

from shampoo_kernels import native, use_backend
from shampoo_kernels.ops import pack
from shampoo_kernels.ops.moments import GRAFTS, Averages, Entry, Rule, moments_

BACKENDS = ["reference", *(["native"] if native.lib else [])]
DTYPES = [torch.float32, torch.float64]
SHAPES = (1, 1), (3, 5), (7, 1), (96, 100), (1, 8195)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return emulation.build(tmp_path_factory.mktemp("moments"), "moments")


def emulated(program):
    """The native op by moments.cu on a copy of the memory that its table leads to."""

    def op(pieces, chunks, moves, steps, beta1, beta2, eps, nesterov, sums, corrected):
        size = moves.element_size()
        spans = []
        for *strided, grad, momentum, own, m, n, row, column in pieces.tolist():
            extent = ((m - 1) * row + (n - 1) * column + 1) * size if m * n else 0
            spans += [(start, extent) for start in strided if start]
            spans += [(start, m * n * size) for start in (grad, momentum, own) if start]
        memory, table = Memory(spans), pieces.clone()
        for row in table:
            row[:5] = torch.tensor([memory.offset(int(address)) for address in row[:5]])
        numbers = torch.tensor([beta1, beta2, eps], dtype=torch.float64)
        sizes = memory.size, len(table), len(chunks), nesterov, sums, corrected
        data = memory.read() + emulation.raw(table, chunks, moves, steps, numbers)
        shapes = (torch.uint8, (memory.size,)), (torch.float64, (len(table),))
        copy, squares = emulation.call(program, moves.dtype, sizes, data, *shapes)
        memory.write(copy)
        return squares

    return op


@pytest.fixture(params=[*BACKENDS, pytest.param("emulated", marks=emulation.needs_compiler)])
def backend(request, monkeypatch):
    if request.param == "emulated":
        op = emulated(request.getfixturevalue("program"))
        monkeypatch.setattr(pack, "native", lambda tensor: True)
        monkeypatch.setattr(torch.ops.shampoo_kernels_native, "moments_", op, raising=False)
        yield request.param
    else:
        with use_backend(request.param):
            yield request.param


class Case(NamedTuple):
    entries: list[Entry]
    moves: Tensor
    steps: Tensor

    def run(self, rule: Rule) -> Averages:
        return moments_(self.entries, self.moves, self.steps, rule)

    def averages(self) -> list[tuple[Tensor, Tensor | None]]:
        """Of every block, copied."""
        return [
            (m.clone(), None if entry.exp_avg_sqs is None else entry.exp_avg_sqs[i].clone())
            for entry in self.entries
            for i, m in enumerate(entry.exp_avgs)
        ]


# Gradients seen: 0 counts as 1.
STEPS = (1, 2, 0, 10, 1000, 1_000_000)


def case(shapes=SHAPES, dtype=torch.float32, squares=True, every=1) -> Case:
    """Stacks of 1 to 3 blocks in all layouts, of sizes from 1e-12 to 1e12; one in four stands
    still; the step of every third stack is not wanted."""
    generator = torch.Generator().manual_seed(len(shapes))
    random = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    entries, count = [], 0
    for shape in shapes:
        averages = list(layouts(random(*shape)))[::every]
        seconds = list(layouts(random(*shape).square()))[::every]
        for x, y in zip(averages, seconds, strict=True):
            scale = 10.0 ** ((count + count // len(STEPS)) % 3 * 12 - 12)
            x *= scale
            y *= scale**2
            count += 1
        first = 0
        while first < len(averages):
            part = slice(first, first := min(len(averages), first + 1 + len(entries) % 3))
            grad = random(len(averages[part]), *shape)
            for g, x in zip(grad, averages[part], strict=True):
                g *= x.abs().max()
            wanted = len(entries) % 3 != 2
            entries.append(Entry(averages[part], seconds[part] if squares else None, grad, wanted))
    blocks = torch.arange(count)
    steps = torch.tensor(STEPS)[blocks % len(STEPS)]
    return Case(entries, (blocks % 4 != 1).to(dtype), steps.to(dtype))


def verify(case: Case, rule: Rule, backend: str) -> None:
    before = case.averages()
    result = case.run(rule)
    after = case.averages()
    dtype = case.moves.dtype
    unit = torch.finfo(dtype).eps / 2
    number = 0
    for entry, momentum, own in zip(case.entries, result.momenta, result.own, strict=True):
        assert entry.wanted or own is momentum
        for i, g in enumerate(entry.grad):
            moves, steps = bool(case.moves[number]), int(case.steps[number])
            exact = restated(*before[number], g, moves, steps, rule, unit)
            for x, wanted, name in zip(
                after[number], exact[:2], ("exp_avg", "exp_avg_sq"), strict=True
            ):
                if x is not None:
                    check_near(x, wanted, name)
            check_near(momentum[i], exact[2], "momentum")
            if entry.wanted:
                check_near(own[i], exact[3], "own")
            if not moves:
                for x, old in zip(after[number], before[number], strict=True):
                    assert x is None or torch.equal(x, old)
                assert torch.equal(momentum[i], before[number][0])
            # The kernels sum all squares in float64, the reference the rows, then their norms. What
            # was not wanted is known as far as roundings let it be.
            T, error = exact[3]
            if entry.wanted or entry.exp_avg_sqs is None:
                T, error = own[i].double(), torch.zeros_like(error)
            square, slack = T.square().sum(), (error * (2 * T.abs() + error)).sum()
            terms, of_sum = (sum(T.shape), unit) if backend == "reference" else (
                T.numel(), 2.0**-53)  # fmt: skip
            off = (result.squared_norms[number] - square).abs()
            assert off <= slack + 2 * (terms + 4) * of_sum * square
            number += 1
    assert result.squared_norms.shape == (number,)
    assert result.squared_norms.dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("graft", GRAFTS)
def test_every_graft(backend, graft, nesterov, dtype):
    emulates = backend == "emulated"
    shapes = SHAPES[:4] if emulates else SHAPES
    rule = Rule((0.9, 0.95), 1e-8, graft, nesterov)
    verify(case(shapes, dtype, graft != "sgd", 2 if emulates else 1), rule, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.0), (0.0, 0.999), (0.3, 1.0), (0.95, 1e-9)])
def test_betas(backend, betas, dtype):
    verify(case(((3, 5), (7, 8)), dtype), Rule(betas, 1e-3, "adam", True), backend)


def test_two_chunks(backend):
    verify(case(((2, 5000),), every=3), Rule((0.9, 0.99), 1e-8, "adam", False), backend)


def test_without_squares(backend):
    """Then the step is the momentum."""
    given = case(((3, 5), (2, 4)), squares=False)
    result = given.run(Rule((0.9, 0.95), 1e-8, "sgd", False))
    for momentum, own in zip(result.momenta, result.own, strict=True):
        assert own is momentum


@pytest.mark.parametrize("shapes", [(), ((0, 3),), ((3, 0), (2, 2)), ((0, 0),)])
def test_nothing_to_do(backend, shapes):
    entries = [
        Entry([torch.ones(shape)], [torch.ones(shape)], torch.ones(1, *shape), True)
        for shape in shapes
    ]
    numbers = torch.ones(len(entries))
    result = moments_(entries, numbers, numbers, Rule((0.9, 0.0), 0.0, "adam", False))
    assert [x.shape[1:] for x in result.own] == list(shapes)
    sizes = torch.tensor([math.prod(shape) for shape in shapes], dtype=torch.float64)
    # T = 1 in every entry; the reference squares a float32 root
    torch.testing.assert_close(result.squared_norms, sizes, rtol=4 * 2.0**-23, atol=0)


def test_still_blocks_keep_what_is_not_finite(backend):
    """Everything of a block that stands still stays bit for bit, whatever its neighbours do."""
    m, v = torch.full((2, 3, 4), 2.0), torch.full((2, 3, 4), 4.0)
    m[0, 1, 2], v[0, 0, 0] = math.inf, math.nan
    grad = torch.zeros(2, 3, 4)
    before = m.clone(), v.clone()
    moves = torch.tensor([0.0, 1.0])
    rule = Rule((0.5, 0.5), 0.0, "rmsprop", False)
    result = moments_([Entry(list(m), list(v), grad, True)], moves, moves, rule)
    if backend != "reference":  # which multiplies by 0
        for x, old in zip((m, v), before, strict=True):
            assert torch.equal(x[0].view(torch.int32), old[0].view(torch.int32))
    assert torch.equal(m[1], torch.ones(3, 4))
    assert torch.equal(v[1], torch.full((3, 4), 2.0))
    assert result.squared_norms[1].item() == pytest.approx(12 / 2, rel=1e-6)


def test_what_lies_around_the_averages_stays(backend):
    frames = torch.rand(2, 10, 11)
    before, inside = frames.clone(), frames[:, 2:7, 3:9]
    entry = Entry([inside[0]], [inside[1]], torch.ones(1, 5, 6), True)
    moments_([entry], torch.ones(1), torch.ones(1), Rule((0.9, 0.9), 1e-8, "adam", True))
    assert (inside != before[:, 2:7, 3:9]).any(-1).all()
    inside.copy_(before[:, 2:7, 3:9])
    assert torch.equal(frames, before)


@pytest.mark.skipif(native.lib is None, reason="no native kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            given = case(((300, 501), (3, 5), (999, 77)), dtype)
            with use_backend("native"):
                result = given.run(Rule((0.9, 0.99), 1e-8, "adam", True))
            averages = itertools.chain.from_iterable(given.averages())
            found.append([*averages, *result.momenta, *result.own, result.squared_norms])
    finally:
        torch.set_num_threads(before)
    for x, *others in zip(*found, strict=True):
        assert all(x is None if y is None else torch.equal(x, y) for y in others)


@emulation.needs_compiler
@pytest.mark.parametrize("flags", [emulation.THREADS, emulation.ADDRESSES], ids=["races", "bounds"])
def test_sanitizers_find_nothing(tmp_path, monkeypatch, flags):
    monkeypatch.setattr(pack, "native", lambda tensor: True)
    op = emulated(emulation.build(tmp_path, "moments", flags))
    monkeypatch.setattr(torch.ops.shampoo_kernels_native, "moments_", op, raising=False)
    verify(case(((7, 8), (96, 100)), every=3), Rule((0.9, 0.9), 1e-8, "adam", True), "emulated")


@emulation.needs_compiler
@pytest.mark.parametrize(
    ("flags", "file", "right", "wrong", "said"),
    [
        (emulation.THREADS, "pieces.h", "threadIdx.x == 0) sums", "threadIdx.x < 2) sums",
         "data race"),
        (emulation.ADDRESSES, "pieces.h", "size - first < kChunkElements ? size - first",
         "size - first < kChunkElements ? size - first + 4", "heap-buffer-overflow"),
    ],
    ids=["race", "bounds"],
)  # fmt: skip
def test_a_planted_fault_is_found(tmp_path, monkeypatch, flags, file, right, wrong, said):
    csrc = emulation.planted(tmp_path, file, right, wrong)
    monkeypatch.setattr(pack, "native", lambda tensor: True)
    op = emulated(emulation.build(tmp_path, "moments", flags, csrc))
    monkeypatch.setattr(torch.ops.shampoo_kernels_native, "moments_", op, raising=False)
    with pytest.raises(AssertionError, match=said):
        case(((4, 4),)).run(Rule((0.9, 0.9), 1e-8, "adam", False))


def test_errors():
    A = torch.ones(1, 2, 3)
    rule, one = Rule((0.9, 0.9), 1e-8, "adam", False), torch.ones(1)
    for entry, error, words in (
        (Entry(list(A), list(A), A.double(), True), TypeError, "moments_: grad must be float32"),
        (Entry(list(A.double()), None, A, True), TypeError, "an average must be float32, got"),
        (Entry(list(A), list(A.double()), A, True), TypeError, "an average must be float32, got"),
        (Entry(list(A), None, A.mT.contiguous().mT, True), ValueError,
         r"grad must be contiguous, got strides \(6, 1, 2\)"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            moments_([entry], one, one, rule)
    if native.lib is not None:
        entry = Entry(list(A), list(A.mT.contiguous().mT), A, True)
        words = r"exp_avg_sqs must have the strides \(3, 1\) of exp_avgs, got strides \(1, 2\)"
        with use_backend("native"), pytest.raises(ValueError, match=words):
            moments_([entry], one, one, rule)
