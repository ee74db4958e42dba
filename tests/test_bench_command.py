"""python -m shampoo_kernels bench: what it concludes, on made-up rows, and one run for real."""

import math
import subprocess
import sys

import pytest
import torch

from shampoo_kernels import chooser
from shampoo_kernels.__main__ import main
from shampoo_kernels.commands import bench
from shampoo_kernels.commands._bench_cases import OPS, Case, stacks
from shampoo_kernels.commands._timing import Times


def row(native, reference, errors=(1e-7, 1e-7), size="4 x 8²", spread=0.01):
    times = {
        name: Times(median, median * (1 - spread), median * (1 + spread), 9)
        for name, median in (("native", native), ("reference", reference))
    }
    return bench.Row("op", size, times, dict(zip(times, errors, strict=True)), {})


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (row(1.0, 2.0), "native"),
        (row(2.0, 1.0), "reference"),
        (row(1.0, 1.01, errors=(1e-6, 1e-7)), "reference"),  # level: the more accurate one
        (row(1.01, 1.0, errors=(1e-7, 1e-6)), "native"),
        (row(1.0, 2.0, errors=(math.nan, 1e-7)), "reference"),
        (row(1.0, 2.0, errors=(0.5, 1e-7)), "reference"),
        (row(1.0, 2.0, errors=(math.inf, math.nan)), None),
    ],
)
def test_preferred_is_the_fastest_that_is_accurate(made, name):
    assert bench.preferred(made) == name


def test_verdict_says_how_much_and_what_is_in_use():
    rows = [row(1.0, 2.0), row(1.0, 8.0)]
    assert bench.verdict(rows, "native") == (
        "op: prefer native, 4.0 times as fast (geometric mean); in use: native"
    )
    assert bench.verdict(rows, "reference").endswith(
        "in use: reference; use_backend('native') asks for it"
    )


def test_verdict_goes_by_size_where_backends_cross():
    rows = [row(2.0, 1.0, size="small"), row(1.0, 2.0, size="large")]
    assert bench.verdict(rows, "native") == (
        "op: prefer reference for small, native for large; in use: native"
    )


def test_verdict_prefers_nothing_that_is_wrong():
    rows = [row(1.0, 2.0, errors=(1.0, 1.0))]
    assert bench.verdict(rows, "native") == "op: no backend is accurate here; in use: native"


def test_a_backend_that_raises_is_a_failure_in_its_row():
    def call():
        if chooser.choose("precondition", "cpu", torch.float32) == "reference":
            raise RuntimeError("no such kernel\nand more")
        return 1.0

    names = bench.candidates("precondition", "cpu")
    found = bench.measure(Case("precondition", "1", "cpu", call, lambda x: 0.0), names, 0.001)
    assert found.failed == {"reference": "RuntimeError: no such kernel"}
    assert "reference fails: RuntimeError: no such kernel" in bench.line(found)
    assert "reference" not in found.times


def test_every_op_is_measured_and_its_reference_is_accurate():
    assert tuple(OPS) == chooser.OPS
    for op, make in OPS.items():
        case = make(2, 6, "cpu")
        with chooser.use_backend("reference"):
            assert case.op == op
            assert float(case.error(case.call())) < 1e-3


@pytest.mark.parametrize(("largest", "found"), [(8, [(4, 8)]), (128, [(256, 32), (64, 128)])])
def test_stacks_keep_to_the_largest_block(largest, found):
    assert stacks(largest) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seconds", "0"], "--seconds must be positive, got 0.0"),
        (["--seconds", "nan"], "--seconds must be positive, got nan"),
        (["--largest", "1"], "--largest must be at least 2, got 1"),
        (["--device", "tpu"], "--device must be cpu or cuda, got tpu"),
    ],
)
def test_wrong_options_are_one_line(options, message, capsys):
    assert main(["bench", *options]) == 2
    assert capsys.readouterr().err == f"bench: {message}\n"


def test_it_runs_and_needs_torch_alone():
    code = (
        "import sys; sys.modules.update(dict.fromkeys("
        "['matplotlib', 'pytest', 'pytest_benchmark', 'sklearn', 'tqdm', 'triton']))\n"
        "import torch; torch.set_num_threads(1)\n"
        "from shampoo_kernels.__main__ import main\n"
        "sys.exit(main(['bench', '--seconds', '0.1', '--largest', '8', '--device', 'cpu']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    head, *lines = result.stdout.splitlines()
    assert f"torch {torch.__version__}" in head
    several = [op for op in chooser.OPS if len(bench.candidates(op, "cpu")) > 1]
    measured, verdicts = lines[: len(several)], lines[len(several) + 1 :]
    assert [line.split()[0] for line in measured] == several
    assert all("native" in line and "reference" in line for line in measured)
    assert {line.split(":")[0] for line in verdicts} == set(chooser.OPS)
    assert sum(": prefer " in line for line in verdicts) == len(several)
