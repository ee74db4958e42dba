"""make bench-compare: what counts as slower, on made-up runs."""

import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import compare

MACHINE = {"cpu": "A CPU", "threads": 2, "isa": "avx512", "torch": "2.13", "python": "3.11"}


def stats(median, spread=0.01):
    return {"median": median, "q1": median * (1 - spread), "q3": median * (1 + spread)}


def run(*, spread=0.01, commit="a" * 40, **medians):
    rows = [
        {
            "fullname": "bench_op.py::bench_op[x]",
            "stats": stats(median, spread),
            "extra_info": {
                "case": case,
                "errors": {"ours": 1e-6},
                "failed": {},
                "baselines": {"theirs": {**stats(3.0), "rounds": 5}},
            },
        }
        for case, median in medians.items()
    ]
    return {
        "machine_info": {"shampoo_kernels": dict(MACHINE)},
        "commit_info": {"id": commit, "dirty": False},
        "benchmarks": rows,
    }


@pytest.mark.parametrize(
    ("new", "spread", "slower"),
    [
        (1.0, 0.01, False),
        (1.04, 0.01, False),  # apart, but within what quiet runs differ by
        (1.2, 0.01, True),
        (1.2, 0.15, False),  # within the spread of both runs
        (2.0, 0.15, True),
        (0.5, 0.01, False),
    ],
)
def test_slower_is_beyond_both_quartiles_and_the_floor(new, spread, slower):
    lines, bad = compare.report(run(a=1.0, spread=spread), run(a=new, spread=spread))
    assert bad is slower
    assert any(line.startswith("slower") for line in lines) is slower


def test_a_slower_row_says_by_how_much_and_how_its_baselines_did():
    base, new = run(a=1.0, b=1.0), run(a=1.5, b=1.0, commit="b" * 40)
    new["benchmarks"][0]["extra_info"]["baselines"]["theirs"]["median"] = 4.5
    lines, bad = compare.report(base, new)
    assert bad
    assert lines == [
        "A CPU, 2 threads; aaaaaaaaaaaa -> bbbbbbbbbbbb",
        "2 rows in both runs: 1 slower beyond noise, 0 faster",
        "slower x1.50; its baselines x1.50: op: a: 1e+03 -> 1.5e+03 ms",
    ]


def test_the_slowest_comes_first():
    lines, _ = compare.report(run(a=1.0, b=1.0), run(a=1.5, b=3.0))
    assert [line.split(":")[-2].strip() for line in lines if line.startswith("slower")] == [
        "b",
        "a",
    ]


def test_rows_of_one_run_alone_are_named():
    lines, bad = compare.report(run(a=1.0, b=1.0), run(b=1.0, c=1.0))
    assert not bad
    assert lines[-2:] == ["only in the base: op: a", "only here: op: c"]


def test_accuracy_is_guarded_too():
    base, new = run(a=1.0), run(a=1.0)
    new["benchmarks"][0]["extra_info"]["errors"]["ours"] = 3e-6
    lines, bad = compare.report(base, new)
    assert bad
    assert lines[-1] == "less accurate: op: a: error 1.0e-06 -> 3.0e-06"
    new["benchmarks"][0]["extra_info"] |= {"errors": {}, "failed": {"ours": "NaN or Inf"}}
    lines, bad = compare.report(base, new)
    assert bad
    assert lines[-1] == "less accurate: op: a: fails now, NaN or Inf"


@pytest.mark.parametrize(
    ("key", "value"), [("cpu", "Another"), ("threads", 8), ("isa", "avx2"), ("quick", True)]
)
def test_another_machine_is_refused(key, value, tmp_path, capsys):
    base, new = run(a=1.0), run(a=1.0)
    new["machine_info"]["shampoo_kernels"][key] = value
    paths = []
    for name, one in (("base", base), ("new", new)):
        paths.append(str(tmp_path / f"{name}.json"))
        Path(paths[-1]).write_text(json.dumps(one))
    assert compare.main(paths) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("compare: ")
    assert captured.err.count("\n") == 1
    assert str(value) in captured.err or "QUICK" in captured.err


def test_another_torch_is_a_note():
    base, new = run(a=1.0), run(a=1.0)
    new["machine_info"]["shampoo_kernels"]["torch"] = "2.14"
    assert "note: torch 2.13 -> 2.14" in compare.report(base, new)[0]


def test_a_base_of_an_older_format_is_read():
    """Baselines were one number, and rows had no list of failures."""
    base = run(a=1.0)
    for row in base["benchmarks"]:
        row["extra_info"]["baselines"] = {"theirs": 3.0}
        del row["extra_info"]["failed"]
    new = copy.deepcopy(run(a=2.0))
    lines, _ = compare.report(base, new)
    assert "slower x2.00; its baselines x1.00: op: a: 1e+03 -> 2e+03 ms" in lines


@pytest.mark.parametrize("arguments", [[], ["one"], ["", "two"], ["a", "b", "c"]])
def test_usage(arguments, capsys):
    assert compare.main(arguments) == 2
    assert capsys.readouterr().err == "usage: compare.py BASE.json NEW.json\n"


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    for name in ("absent.json", "bad.json"):
        assert compare.main([str(tmp_path / name), "x"]) == 2
        assert f"{name} cannot be read: " in capsys.readouterr().err


def test_it_ends_with_1_when_something_is_slower(tmp_path, capsys):
    for name, median in (("base", 1.0), ("new", 2.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(run(a=median)))
    paths = [str(tmp_path / f"{name}.json") for name in ("base", "new")]
    assert compare.main(paths) == 1
    assert "slower x2.00" in capsys.readouterr().out
    assert compare.main(paths[::-1]) == 0
