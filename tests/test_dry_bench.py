"""bench/gpu_bench*.py and tune.py without a GPU, as test_dry.py the checks."""

import json
import sys
import time
import types

import emulated_product
import pytest
import torch

pytest.importorskip("triton")

import dry
from dry import Cuda, load

from shampoo_kernels import gram_ema_, inverse_root, native, orthogonalize
from shampoo_kernels.kernels import gram_ema, table
from shampoo_kernels.kernels import product as product_module

checks, bench = dry.checks, dry.bench


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
    find, here = module.importlib.util.find_spec, ("quack", "gram_newton_schulz")
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: name if name in here else find(name)
    )
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
def test_benchmarks_of_pieces(bench, monkeypatch):
    load("gpu_checks_native", monkeypatch)
    own = load("gpu_bench_native", monkeypatch)
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


def by_reference(left, right, G, beta, alpha):
    """What the kernel of gpu_both_sides.py does, which no CPU runs outside of the interpreter."""
    gram_ema_(left, G, beta, alpha, side="left")
    gram_ema_(right, G, beta, alpha, side="right")


def test_benchmarks(bench, peers, quack, steps, monkeypatch, tmp_path, capsys):
    """Every kind of job gives a row; only what a CPU's torch cannot do is said to have failed."""
    roots = load("gpu_bench_roots", monkeypatch)
    jobs = list(dict.fromkeys(map(small, [*bench.jobs(), *roots.jobs()])))
    monkeypatch.setattr(roots, "jobs", list)
    both = load("gpu_both_sides", monkeypatch)
    monkeypatch.setattr(both, "both_sides_", by_reference)
    monkeypatch.setattr(both, "jobs", lambda: [(both.bench_both_sides, (2, 24, 32))])
    monkeypatch.setattr(bench, "jobs", lambda: jobs)
    monkeypatch.setattr(peers, "jobs", lambda: [(peers.bench_peer, ("torch.optim.Muon",))])
    file = tmp_path / "gpu.json"
    assert bench.main([str(file), "1000"]) == 0
    results = json.loads(file.read_text())
    assert not results["left out"], results["left out"]
    assert len(results["rows"]) == len(jobs) + 5
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


@pytest.fixture
def roots(bench, monkeypatch):
    return load("gpu_bench_roots", monkeypatch)


@pytest.mark.parametrize(("method", "precision", "kind"), [
    ("newton", "highest", "float32"), ("product", "high", "16-bit"),
])  # fmt: skip
def test_the_work_of_a_root_is_that_of_its_launches(roots, monkeypatch, method, precision, kind):
    """As many products as the driver multiplies with, half of each for newton; per block, at least
    A and its root move, at most three operands and two results a launch."""
    n, launches = 40, []

    def product(A, B, D, **options):
        launches.append(A is not None)
        return emulated_product.product(A, B, D, **options)

    counted = roots.work(method, n, 2, 1e-3, precision)
    monkeypatch.setattr(roots.kernels, "multiply", product)
    A, one = torch.eye(n)[None], torch.ones(1)
    steps = roots.roots.schedule(method, 1e-3, 2, torch.float32)
    arithmetic = roots.kernels.arithmetic(method, n, 2, 1e-3, precision)
    roots.kernels.iterate(method, A, one, one > 0, 1e-3, 2, steps, arithmetic)
    each = n * n * (n + 128) if method == "newton" else 2 * n**3
    assert counted.flops[kind] == sum(launches) * each
    assert sum(counted.flops.values()) == counted.flops[kind]
    assert 8 * n * n < counted.nbytes <= len(launches) * 5 * 4 * n * n
    assert "GFLOP" in str(counted)


def test_the_floor_of_a_root(roots):
    """The slower of the products at the rates of the run and of two matrices at a copy's."""
    work = roots.Work({"float32": 6e9, "16-bit": 4e9}, 1e9)
    rate = {"tf32 TFLOP/s": 300.0, "bf16 TFLOP/s": 400.0, "copy GB/s": 1e9}
    assert work.floor(2, 1000, rate) == pytest.approx(2 * (0.06 + 0.01))
    assert work.floor(2, 1000, rate | {"copy GB/s": 8.0}) == pytest.approx(2 * 1.0)


def test_lines_of_others_than_ours(bench):
    row = {"milliseconds": {"ours": 2.0, "theirs": 4.0, "failed": None}, "errors": {"theirs": 0.5},
           "floors": {"ours": 1.0, "theirs": 1.0, "failed": 1.0},
           "work": {"ours": "1 GFLOP", "failed": "2 GFLOP"}}  # fmt: skip
    assert bench.more(row) == ["| | | 25 | 5.0e-01 | theirs |", "| | | 50 |  | ours: 1 GFLOP |",
                               "| | |  |  | failed: 2 GFLOP |"]  # fmt: skip
    assert bench.more({"milliseconds": {"ours": 1.0}}) == []
