"""bench/gpu_checks*.py without a GPU: every line that can run on a CPU does, small, by the
reference and the emulated product kernel, so that the first GPU meets no silly mistake."""

import functools
import types

import emulation
import pytest
import test_emulated_root
import torch

pytest.importorskip("triton")

import dry
from dry import Graph, Stream, load

from shampoo_kernels import native
from shampoo_kernels.kernels import table

checks = dry.checks
PARTS = ("gpu_checks_products", "gpu_checks_roots", "gpu_checks_graphs")


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
        load("gpu_matrices", patch)
        parts = [load(part, patch) for part in PARTS]
        return [name for part in parts for name in {**getattr(part, "SMALL", {}), **part.LARGE}]


@pytest.mark.parametrize("name", names())
def test_checks(checks, monkeypatch, name):
    monkeypatch.setattr(checks.gpu_checks_graphs, "capture", again)
    checks.run(checks.checks()[name])


def test_capturing(checks):
    graph, captured = checks.gpu_checks_graphs.capture(lambda: [torch.ones(2)], Stream())
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

    for part in ("gpu_checks_products", "gpu_checks_roots"):
        monkeypatch.setattr(getattr(checks, part), "SMALL", {})
    monkeypatch.setattr(
        checks.gpu_checks_products, "SMALL", {"right": lambda: None, "wrong": wrong}
    )
    assert checks.main(["--small"]) == 1
    said = capsys.readouterr().out
    assert "passed  right" in said
    assert "FAILED  wrong" in said
    assert "not so" in said
    assert "1 checks passed, 1 failed" in said
    assert checks.main(["--small", "--part", "0/2"]) == 0


@pytest.mark.skipif(native.lib is None, reason="no native kernels")
def test_checks_of_pieces(checks, monkeypatch):
    """Of the CUDA C++, what the CPU's kernels do too."""
    pieces = load("gpu_checks_pieces", monkeypatch)
    own = load("gpu_checks_native", monkeypatch)
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
