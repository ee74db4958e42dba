"""bench/gpu_checks.py and gpu_bench.py without a GPU: every line that can run on a CPU does, small,
by the reference and the emulated product kernel, so that the first GPU meets no silly mistake."""

import contextlib
import functools
import importlib.util
import json
import sys
import time
import types
from pathlib import Path

import emulated_product
import emulation
import pytest
import test_emulated_root
import torch

pytest.importorskip("triton")

from shampoo_kernels import inverse_root, native, orthogonalize
from shampoo_kernels.kernels import gram_ema, table
from shampoo_kernels.kernels import product as product_module

BENCH = Path(__file__).resolve().parents[1] / "bench"
SIZES = {"race": (70, 16, 3), "wide offsets": (128, 3), "roots": (33,), "bounds": (1, 33),
         "workspace": (40, 4)}  # fmt: skip


REPLACED = {("gpu_checks", "DEVICE"), ("gpu_timing", "DEVICE"), ("gpu_bench", "BACKEND")}


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self): ...
    def synchronize(self): ...

    def elapsed_time(self, end):
        return 0.5


class Stream:
    def synchronize(self): ...
    def wait_stream(self, other): ...


class Graph:
    """What is called under `torch.cuda.graph` has run already; a replay does nothing more."""

    def replay(self): ...


class Cuda:
    """The part of torch.cuda that the two files use, on a CPU."""

    Event, Stream, CUDAGraph = Event, Stream, Graph

    def __getattr__(self, name):
        def nothing(*arguments, **options):
            return 0

        known = ("synchronize", "set_sync_debug_mode", "reset_peak_memory_stats", "empty_cache",
                 "memory_allocated", "max_memory_allocated", "current_device")  # fmt: skip
        if name not in known or not hasattr(torch.cuda, name):
            raise AttributeError(name)
        return nothing

    def is_available(self):
        return True

    def current_stream(self):
        return Stream()

    def mem_get_info(self):
        return 1 << 40, 1 << 40

    def get_device_name(self):
        return "no GPU"

    def stream(self, stream):
        assert isinstance(stream, Stream)
        return contextlib.nullcontext()

    def graph(self, graph, stream):
        assert isinstance(graph, Graph)
        assert isinstance(stream, Stream)
        return contextlib.nullcontext()


class Torch:
    """torch with another torch.cuda."""

    cuda = Cuda()

    def __getattr__(self, name):
        return getattr(torch, name)


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))  # for what it imports from there
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "torch", Torch())
    for attribute, value in (("DEVICE", "cpu"), ("BACKEND", "reference")):
        monkeypatch.setattr(module, attribute, value, raising=(name, attribute) in REPLACED)
    return module


@pytest.fixture
def checks(monkeypatch):
    module = load("gpu_checks", monkeypatch)
    monkeypatch.setattr(module, "COMPILER", "eager")
    monkeypatch.setattr(module, "SIZES", SIZES)
    monkeypatch.setattr(module, "product", emulated_product.product)
    monkeypatch.setattr(table, "target", lambda device: "sm_90")
    return module


def again(function, stream):
    """A graph that computes the same again into what the first time gave."""
    captured, graph = function(), Graph()

    def replay():
        for old, new in zip(captured, function(), strict=True):
            old.copy_(new)

    graph.replay = replay
    return graph, captured


def names():
    with pytest.MonkeyPatch.context() as patch:
        return [*load("gpu_checks", patch).SMALL, *load("gpu_checks", patch).LARGE]


@pytest.mark.parametrize("name", names())
def test_checks(checks, monkeypatch, name):
    monkeypatch.setattr(checks, "capture", again)
    checks.run(checks.checks()[name])


def test_capturing(checks):
    graph, captured = checks.capture(lambda: [torch.ones(2)], Stream())
    assert isinstance(graph, Graph)
    assert captured[0].tolist() == [1, 1]


@pytest.mark.parametrize("op", sorted({row.op for row in table.ROWS}))
def test_checks_of_rows(checks, op):
    found = {
        name: check for name, check in checks.checks().items() if name.startswith(f"row {op} ")
    }
    modes = {mode for row in table.ROWS if (row.target, row.op) == ("sm_90", op)
             for mode in row.modes}  # fmt: skip
    assert {name.split()[-1] for name in found} == modes
    for check in found.values():
        check()


def test_a_check_that_fails_is_said_and_counted(checks, monkeypatch, capsys):
    def wrong():
        raise AssertionError("not so")

    monkeypatch.setattr(checks, "SMALL", {"right": lambda: None, "wrong": wrong})
    assert checks.main(["--small"]) == 1
    said = capsys.readouterr().out
    assert "passed  right" in said
    assert "FAILED  wrong" in said
    assert "not so" in said
    assert "1 checks passed, 1 failed" in said
    assert checks.main(["--small", "--part", "0/2"]) == 0


@pytest.fixture
def bench(checks, monkeypatch):
    timing = load("gpu_timing", monkeypatch)
    monkeypatch.setattr(timing, "ROTATED_BYTES", 1 << 14)
    monkeypatch.setattr(timing, "COPIED_BYTES", 1 << 10)
    monkeypatch.setattr(timing, "RATED_N", 16)
    return load("gpu_bench", monkeypatch)


@pytest.fixture
def peers(bench, monkeypatch):
    return load("gpu_bench_peers", monkeypatch)


@pytest.fixture
def steps(bench, monkeypatch):
    module = load("gpu_bench_steps", monkeypatch)
    monkeypatch.setattr(module, "MODELS", {"a model": [(6, 4), (4,), (8, 2, 3)]})
    return module


class Orthogonalizer:
    """What gram_newton_schulz's two classes compute, by torch."""

    steps = ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0))

    def __init__(self, ns_use_kernels=True, compile_kwargs=()):
        assert compile_kwargs is None

    def __call__(self, G):
        return orthogonalize(G, coefficients=self.steps)


@pytest.fixture
def quack(bench, monkeypatch):
    """The rows of quack and gram_newton_schulz, with stand-ins for both."""

    def gemm_symmetric(A, B, C=None, out=None, out_dtype=None, alpha=1.0, beta=1.0):
        D = alpha * (A.float() @ B.float()) + (0 if C is None else beta * C)
        return D.to(out_dtype or A.dtype) if out is None else out.copy_(D)

    iface = types.SimpleNamespace(gemm_symmetric=gemm_symmetric)
    monkeypatch.setitem(sys.modules, "quack", types.SimpleNamespace(gemm_interface=iface))
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", iface)
    peer = types.SimpleNamespace(GramNewtonSchulz=Orthogonalizer,
                                 StandardNewtonSchulz=Orthogonalizer,
                                 POLAR_EXPRESS_COEFFICIENTS=Orthogonalizer.steps)  # fmt: skip
    monkeypatch.setitem(sys.modules, "gram_newton_schulz", peer)
    module = load("gpu_bench_quack", monkeypatch)
    monkeypatch.setattr(module, "SIZES", [(2, 12)])
    monkeypatch.setattr(module, "RECTANGLES", [(2, 6, 12)])
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    return module


def test_rows_of_quack_and_gram_newton_schulz(quack):
    rows = [function(*arguments, {"bf16 TFLOP/s": 1.0}) for function, arguments in quack.jobs()]
    assert len(rows) == 2
    for row in rows:
        assert len(row["milliseconds"]) >= 4
        assert None not in row["milliseconds"].values()
        assert row["error"] < 0.01
        assert row["errors"]
        assert all(error < 0.01 for error in row["errors"].values())


def test_whole_steps(steps, monkeypatch):
    ((function, arguments),) = steps.jobs()
    row = function(*arguments, {})
    assert row["case"].startswith("one step of 10, a model, 76 parameters")
    assert {"ours", "AdamW"} <= set(row["milliseconds"])
    assert None not in row["milliseconds"].values()
    monkeypatch.setattr(Cuda, "mem_get_info", lambda self: (100, 100))
    with pytest.raises(MemoryError, match="are free"):
        function(*arguments, {})


def test_bytes_of_llama_1b(steps):
    """Moments, statistics and roots in float32, all in bfloat16: 2 + 2 + 8 + 16 a parameter; less
    for the embedding, whose long side has no factor."""
    count = steps.cases.count(steps.cases.LLAMA_1B)
    assert 1.23e9 < count < 1.24e9
    assert 20 < steps.bytes_needed(steps.cases.LLAMA_1B) / 1.1 / count < 28


def small(job):
    """The same case on blocks of 32, four of them at most."""
    function, (batch, _, *rest) = job
    return function, (min(batch, 4), 32, *rest)


@pytest.mark.skipif(native.lib is None, reason="no native kernels")
def test_checks_of_pieces(checks, monkeypatch):
    """Of the CUDA C++, what the CPU's kernels do too."""
    pieces = load("gpu_checks_pieces", monkeypatch)
    own = load("gpu_checks_native", monkeypatch)
    for module in (pieces, own):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    own.check_pack()
    pieces.check_pack_finite(60)
    for dtype in (torch.float32, torch.float64):
        pieces.check_moments(60, dtype)


@emulation.needs_compiler
@pytest.mark.skipif(native.lib is None, reason="no native kernels")
def test_checks_of_small_matrices(checks, monkeypatch, tmp_path):
    """The roots by inverse_root.cu in emulation, the others by the CPU's kernels."""
    load("gpu_checks_pieces", monkeypatch)
    own = load("gpu_checks_native", monkeypatch)
    monkeypatch.setattr(own, "DEVICE", "cpu")
    program = emulation.build(tmp_path, "inverse_root")
    root_of = functools.partial(test_emulated_root.root_of, program)
    monkeypatch.setattr(own, "small_root", root_of)
    lib = types.SimpleNamespace(inverse_root_small_bytes=lambda *of: 0)
    monkeypatch.setattr(own, "native", types.SimpleNamespace(lib=lib))
    monkeypatch.setattr(own.small, "_limit", lambda device: 1 << 20)
    for dtype, tensor_cores in ((torch.float32, False), (torch.float32, True),
                                (torch.float64, False)):  # fmt: skip
        own.check_small_root(5, dtype, tensor_cores)
    for dtype in (torch.float32, torch.float64):
        own.check_bound_and_power(33, dtype)
        own.check_basis(33, dtype)


@pytest.mark.skipif(native.lib is None, reason="no native kernels")
def test_benchmarks_of_pieces(bench, monkeypatch):
    load("gpu_checks_native", monkeypatch)
    own = load("gpu_bench_native", monkeypatch)
    monkeypatch.setattr(own, "DEVICE", "cpu")
    shapes, rate = [(40, 30), (1030, 5)], {"copy GB/s": 1.0}
    rows = [own.bench_pack("two", shapes, torch.bfloat16, apply, rate) for apply in (False, True)]
    rows.append(own.bench_moments("two", shapes, rate))
    for row in rows:
        assert "3 pieces" in row["case"]
        assert row["floor"] > 0
        assert row["error"] < 1e-6
    monkeypatch.setattr(
        own, "small_root",
        lambda A, p, ridge, form: inverse_root(A, p, ridge=ridge, method="newton"),
    )  # fmt: skip
    roots = own.bench_small_root(16, 12, 2, 1e-6, rate)
    assert {"ours", "same schedule, bmm", "coupled Newton, bmm"} <= set(roots["milliseconds"])
    rows += [roots, own.bench_power(4, 33, rate), own.bench_basis(4, 33, rate)]
    for row in rows:
        assert row["error"] < 0.05, row
        assert all(value is not None for value in row["milliseconds"].values()), row


def test_benchmarks(bench, peers, quack, steps, monkeypatch, tmp_path, capsys):
    """Every kind of job gives a row; only what a CPU's torch cannot do is said to have failed."""
    jobs = list(dict.fromkeys(map(small, bench.jobs())))
    monkeypatch.setattr(bench, "jobs", lambda: jobs)
    monkeypatch.setattr(peers, "jobs", lambda: [(peers.bench_peer, ("torch.optim.Muon",))])
    file = tmp_path / "gpu.json"
    assert bench.main([str(file), "1000"]) == 0
    results = json.loads(file.read_text())
    assert not results["left out"], results["left out"]
    assert len(results["rows"]) == len(jobs) + 4
    assert results["rows"][-1]["case"] == "torch.optim.Muon, 10 steps"
    for row in results["rows"]:
        failed = [name for name, value in row["milliseconds"].items() if value is None]
        assert all("out_dtype" in name for name in failed), (row["case"], failed)
        assert row["error"] < 0.05, row
    assert all(value > 0 for value in results["rates"].values())
    said = capsys.readouterr().out
    assert all(row["case"] in said for row in results["rows"])


def test_out_of_time(bench, tmp_path, capsys):
    file = tmp_path / "gpu.json"
    assert bench.main([str(file), "-1"]) == 0
    assert "not measured, out of time" in capsys.readouterr().out
    assert not json.loads(file.read_text())["rows"]
    assert time.monotonic() > bench.timing.DEADLINE


def test_tuning(bench, monkeypatch, tmp_path, capsys):
    """All of bench/tune.py but the kernels and the times."""
    tune = load("tune", monkeypatch)
    for module in (gram_ema, product_module):
        monkeypatch.setattr(module, "product", emulated_product.product)
    shapes = [tune.Point(op, mode, 2, 33, 40) for op, mode in (
        ("gram_ema_", "16-bit"), ("newton", "tf32x3"), ("product", "16-bit"),
        ("precondition", "bf16x3"), ("power_iteration", "tf32x3"))]  # fmt: skip
    all_candidates = tune.candidates
    monkeypatch.setattr(tune, "points", lambda modes: shapes)
    monkeypatch.setattr(tune, "candidates", lambda *a: list(all_candidates(*a))[:3])
    monkeypatch.setattr(tune, "TUNED", tmp_path / "tuned.py")
    select = table.select
    assert tune.main(["--results", str(tmp_path), "--seconds", "1000"]) == 0
    assert table.select is select
    said = capsys.readouterr()
    assert "5 points chosen" in said.out, said
    record = json.loads((tmp_path / "tune.json").read_text())
    assert [len(timings) for _, timings in record["points"]] == [3] * 5
    assert all(error < 1e-2 for _, timings in record["points"] for *_, error in timings)
    assert (tmp_path / "tuned.py").read_text().count('"') >= 6
