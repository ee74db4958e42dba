"""The page of a run, from made-up results: what is faster, what fails, which limit, the plots."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import judging
import page
import plots
import report

FACTS = {
    "cpu": "A CPU", "python": "3.11", "torch": "2.13", "shampoo_kernels": "0.1", "threads": 2,
    "isa": "avx512", "command": "make bench", "load": 0.1, "peers": {"other": "1.0"},
    "gemm_gflops": {"float32": 100.0, "bfloat16": 400.0}, "copy_gbs": 50.0, "fma_gflops": 200.0,
}  # fmt: skip


def times(median):
    return {"median": median, "q1": 0.99 * median, "q3": 1.01 * median, "rounds": 9}


def a_row(fullname, median, baselines, **info):
    info = {"case": "a case", "errors": {}, "failed": {}, "sizes": {}} | info
    info["baselines"] = {name: times(seconds) for name, seconds in baselines.items()}
    return {"fullname": fullname, "stats": times(median), "extra_info": info}


def results(*rows, **rest):
    return {
        "machine_info": {"shampoo_kernels": FACTS},
        "commit_info": {"id": "abc", "dirty": False},
        "datetime": "2026-11-25T00:00:00",
        "benchmarks": list(rows),
        **rest,
    }


def test_a_row_has_times_the_speedup_and_errors():
    row = a_row("bench_gram.py::bench_gram[1]", 0.002, {"theirs": 0.006},
                errors={"ours": 1e-7, "theirs": 2e-7})  # fmt: skip
    assert page.table([row], FACTS)[-1] == (
        "| a case | 2 ± 2 % | 1.0e-07 |  | 6 ± 2 % (**3.00x**) 2.0e-07 |"
    )


def test_what_fails_stays_in_its_row_without_a_speedup():
    row = a_row("bench_root.py::bench_root[1]", 0.002, {"garbage": 0.001},
                failed={"garbage": "error 0.45", "raises": "LinAlgError: no"})  # fmt: skip
    last = page.table([row], FACTS)[-1]
    assert "**fails**: error 0.45" in last
    assert "**fails**: LinAlgError: no" in last
    assert "x**" not in last
    summary = page.summary(page.grouped([row]))
    assert "| root | garbage | 0; fails in 1 |  |  |  |" in summary


def test_the_summary_has_least_median_and_most():
    rows = [a_row("bench_gram.py::bench_gram[1]", 1.0, {"theirs": x, "our reference": 1.0})
            for x in (1.0, 2.0, 5.0)]  # fmt: skip
    *_, last = page.summary(page.grouped(rows))
    assert last == "| gram | theirs | 3 | 1.00, **2.00**, 5.00 |  |  |"


@pytest.mark.parametrize(
    ("info", "seconds", "name"),
    [
        ({"flops": 200e9, "rate": "float32"}, 1.0, "float32 FMA"),
        ({"flops": 400e9, "rate": "bfloat16"}, 1.0, "bfloat16 GEMM"),
        ({"moved": 50e9}, 1.0, "copy"),
        ({"flops": 200e9, "moved": 100e9}, 2.0, "copy"),
        ({"flops": 600e9, "moved": 100e9}, 3.0, "float32 FMA"),
    ],
)
def test_the_limit_is_whichever_needs_longer(info, seconds, name):
    assert page.limit(info, FACTS) == (pytest.approx(seconds), name)


def test_without_operations_or_bytes_there_is_no_limit():
    assert page.limit({"flops": None, "moved": None}, FACTS) is None


@pytest.mark.parametrize(
    ("fullname", "op"),
    [
        ("bench/bench_gram_ema.py::bench_gram_ema[a-b]", "gram_ema"),
        ("bench/bench_inverse_root.py::bench_roots[1]", "inverse_root: roots"),
        ("bench/bench_x.py::bench_two_words", "x: two words"),
    ],
)
def test_tables_go_by_file_and_function(fullname, op):
    assert page.op_of({"fullname": fullname}) == op


def test_a_busy_machine_is_said():
    busy = results() | {"machine_info": {"shampoo_kernels": FACTS | {"load": 3.0}}}
    assert "not quiet: load average 3.0" in page.markdown(busy)
    assert "not quiet" not in page.markdown(results())


def test_counted_tables_and_what_was_left_out_are_on_the_page():
    text = page.markdown(
        results(tables={"bytes": [{"model": "m", "ours": 8.0}]}, left_out=["x is not installed"])
    )
    assert "### bytes\n\n| model | ours |\n| --- | --- |\n| m | 8 |" in text
    assert text.endswith("x is not installed")


def test_judging():
    found, failed = judging.judged({"a": 1e-3, "b": 0.2, "c": math.nan, "d": "ValueError: x"})
    assert found == {"a": 1e-3, "b": 0.2}
    assert failed == {"b": "error 0.2", "c": "NaN or Inf", "d": "ValueError: x"}
    assert judging.judged({"a": 5.0}, math.inf) == ({"a": 5.0}, {})
    raising = {"good": lambda: 1.0, "bad": lambda: 1 / 0}
    assert judging.errors_of(raising, lambda x: x) == {
        "good": 1.0,
        "bad": "ZeroDivisionError: division by zero",
    }


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5, 3.0])
def test_slope_is_the_exponent(power):
    xs = [32, 64, 256, 1024]
    assert plots.slope(xs, [7 * x**power for x in xs]) == pytest.approx(power)


def made_up_run():
    rows = [
        a_row(f"bench_growth.py::bench_{op}[{b}-{n}]", 1e-9 * b * n**3,
              {baseline: 2e-9 * b * n**3, "our reference": 3e-9 * b * n**3},
              sizes={"batch": b, "n": n})
        for op, baseline in (("gram", "baddbmm_"), ("root", "torch.linalg.eigh"))
        for b in (1, 4) for n in (8, 16, 32)
    ]  # fmt: skip
    rows += [
        a_row("bench_inverse_root.py::bench_roots[1]", 1e-3, {"theirs": 2e-3, "garbage": 1e-3},
              sizes={"p": p, "condition": condition}, failed={"garbage": "error 0.4"},
              errors={"ours": 1e-6, "theirs": 1e-5, "garbage": 0.4})
        for p in (2, 4) for condition in (1e2, 1e4)
    ]  # fmt: skip
    counted = [{"optimizer": "ours", "1 layers": 10.0, "4 layers": 10.0}]
    shared = [{"ranks": r, "part of the work": 1 / r, "MiB sent": 4.0 * (r - 1)} for r in (1, 2, 4)]
    tables = {"torch operations a step": counted, "ranks: what the busiest has of a step": shared}
    return results(*rows, tables=tables)


def test_the_page_and_its_plots(tmp_path, capsys):
    (tmp_path / "cpu.json").write_text(json.dumps(made_up_run()))
    assert report.main([str(tmp_path / "cpu.json")]) == 0
    text = capsys.readouterr().out
    for name in ("speedup", "roots", "growth", "layers", "ranks", "crossover"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"]({name}.png)" in text


def test_plots_without_their_rows_are_not_drawn(tmp_path):
    assert plots.draw_all(results(), tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


def test_fitted_slopes_and_speedups_are_drawn():
    figure = plots.draw_growth(
        {"growth: gram": [r for r in made_up_run()["benchmarks"] if "_gram" in r["fullname"]]}
    )
    labels = [text.get_text() for axis in figure.axes for text in axis.get_legend().get_texts()]
    assert labels == ["gram_ema_: 3.00", "baddbmm_: 3.00", "gram_ema_: 1.00", "baddbmm_: 1.00"]


def test_slopes_over_ranks_leave_out_zeros():
    rows = made_up_run()["tables"]["ranks: what the busiest has of a step"]
    (axis,) = plots.draw_ranks(rows).axes
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["part of the work: -1.00", "MiB sent: 1.58"]  # from 4 to 12: log2 of 3


def test_usage(capsys):
    assert report.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: ")
