"""bench/tune.py without a GPU: candidates, the choice among made-up timings, what is written."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from shampoo_kernels.kernels import table

BENCH = Path(__file__).resolve().parents[1] / "bench"


def load():
    spec = importlib.util.spec_from_file_location("tune", BENCH / "tune.py")
    module = sys.modules["tune"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tune = load()
GRAM = tune.Point("gram_ema_", "16-bit", 1, 256, 8192)


@pytest.mark.parametrize("target", table.SHARED)
def test_every_candidate_fits(target):
    for point in tune.points(tune.modes(target)):
        found = list(tune.candidates(target, point))
        assert len(found) > 5
        assert len(set(found)) == len(found)
        for row in found:
            assert table.shared_bytes(row, point.mode) <= table.SHARED[target]
            assert (row.n, row.k, row.modes) == (point.n, point.k, (point.mode,))
            assert row.form == "pointer" or target == "sm_90"
            assert not row.split or table.splits(row, point.batch, point.n, point.k) > 1


def test_the_derived_rows_are_among_the_candidates():
    """So that a measurement can only improve on them."""
    for point in tune.points(tune.modes("sm_90")):
        derived = table.select("sm_90", point.op, point.mode, point.n, point.k, True)
        shapes = {(r.form, r.block, r.block_k, r.warps, r.stages)
                  for r in tune.candidates("sm_90", point)}  # fmt: skip
        assert (derived.form, derived.block, derived.block_k, derived.warps,
                derived.stages) in shapes  # fmt: skip


def timing(milliseconds, error=0.0, **changes):
    row = table.Row("sm_90", "gram_ema_", ("16-bit",), 256, "pointer", 64, 32, 4, 2, k=8192)
    return tune.Timing(row._replace(**changes), milliseconds, error)


def test_the_fastest_that_is_right():
    wrong, slow, fast = timing(0.5, error=0.1), timing(2.0), timing(1.0, stages=3)
    assert tune.best([wrong, slow, fast], allowed=0.01) == fast
    assert tune.best([wrong], allowed=0.01) is None
    assert tune.best([timing(0.5, error=float("nan")), slow], allowed=0.01) == slow
    assert tune.best([], allowed=0.01) is None


def test_noise_does_not_choose():
    """Within 2 % of the fastest, the smaller configuration."""
    small, large = timing(1.01), timing(1.0, block=128, warps=8)
    assert tune.best([large, small], allowed=1.0) == small
    assert tune.best([large, timing(1.03)], allowed=1.0) == large


def made_up(point, rows):
    """64 x 64 up to n = 1024, 128 x 128 above; sums split where that can be."""
    wanted = 64 if point.n <= 1024 else 128
    return [
        tune.Timing(row, 1.0 + (row.block != wanted) + 0.5 * (not row.split), 0.0)
        for row in rows
    ]  # fmt: skip


def tuned_rows(monkeypatch, tmp_path, target="sm_90"):
    todo = tune.points({"gram_ema_": ("16-bit",), "newton": ("tf32x3",)})
    chosen, everything = tune.tune(target, todo, made_up, lambda p: 1.0, time.monotonic() + 100)
    assert list(chosen) == list(everything) == todo
    path = tmp_path / "tuned.py"
    rows = tune.rows(chosen, "bench/results/x/tune.json")
    tune.write(rows, "a GPU", "torch 2, triton 3", "2026-01-01", path)
    namespace = {}
    exec(path.read_text(), namespace)
    assert '"""Measured rows of table.py' in path.read_text()
    assert "a GPU, 2026-01-01, torch 2, triton 3" in path.read_text()
    read = tuple(table.Row(*row) for row in namespace["ROWS"])
    monkeypatch.setattr(table, "ROWS", (*read, *table.ROWS))
    return path, read


def test_what_is_written_is_selected(monkeypatch, tmp_path):
    _, read = tuned_rows(monkeypatch, tmp_path)
    assert all("bench/results/" in row.chosen and " ms for " in row.chosen for row in read)
    for op, mode in (("gram_ema_", "16-bit"), ("newton", "tf32x3")):
        for n, k in ((1, 1), (256, 256), (1024, 1024), (1025, 64), (8192, 8192), (100000, 10**6)):
            row = table.select("sm_90", op, mode, n, k, True)
            assert row in read
            assert row.block == (64 if n <= 1024 else 128), (n, k, row)
    assert (
        table.splits(table.select("sm_90", "gram_ema_", "16-bit", 256, 8192, True), 1, 256, 8192)
        > 1
    )
    assert table.select("sm_90", "gram_ema_", "tf32x3", 64, 64, True) not in read


def test_rows_of_other_targets_stay(monkeypatch, tmp_path):
    path, first = tuned_rows(monkeypatch, tmp_path)
    chosen = {GRAM: timing(1.0, target="sm_80")}
    tune.write(tune.rows(chosen, "bench/results/y"), "another", "", "", path)
    namespace = {}
    exec(path.read_text(), namespace)
    targets = [row[0] for row in namespace["ROWS"]]
    assert targets == ["sm_90"] * len(first) + ["sm_80"]
    tune.write(tune.rows(chosen, "bench/results/y"), "another", "", "", path)
    exec(path.read_text(), namespace)
    assert [row[0] for row in namespace["ROWS"]] == targets


def test_out_of_time_and_nothing_right_keep_what_there_is(capsys):
    assert tune.tune("sm_90", [GRAM], made_up, lambda p: 1.0, time.monotonic() - 1) == ({}, {})
    chosen, everything = tune.tune("sm_90", [GRAM], made_up, lambda p: -1.0, time.monotonic() + 9)
    assert not chosen
    assert list(everything) == [GRAM]
    assert "out of time" in (said := capsys.readouterr().err)
    assert "nothing is right" in said


def test_the_file_in_the_package_is_what_table_reads():
    from shampoo_kernels.kernels import tuned

    assert table.ROWS[: len(tuned.ROWS)] == tuple(table.Row(*row) for row in tuned.ROWS)
    assert Path(tuned.__file__) == tune.TUNED


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 1
    assert capsys.readouterr().err == "there is no GPU here: nothing was tuned\n"
