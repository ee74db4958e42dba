"""bench/gpu.sh with stand-ins for Python, compute-sanitizer and the GPU: what it calls, what it
leaves behind, and what it says where a part fails."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench/gpu.sh"
FILES = {"build.txt", "checks.txt", "sanitizer.txt", "gpu.json", "gpu.md", "bench.txt"}
PYTHON = """#!/usr/bin/env bash
echo "$PWD|$PYTHONPATH|$*" >>"$CALLS"
case "$*" in
*get_device_name*) echo a-gpu ;;
*pip\\ install*) exit "$PIP" ;;
*why_not*) exit "$NO_CUDA" ;;
*gpu_checks.py*) echo "1 checks passed, 0 failed"; exit "$CHECKS" ;;
*gpu_bench.py*) echo '{}' >"$2"; echo "| a table |"; exit "$BENCH" ;;
esac
"""
SANITIZER = """#!/usr/bin/env bash
[ "$1 $3 $4" = "--tool --error-exitcode 9" ] || exit 1
echo "compute-sanitizer $2" >>"$CALLS"
shift 4
"$@" || exit 1
exit "$SANITIZER"
"""


@pytest.fixture
def run(tmp_path):
    """run(CHECKS=1, ...) -> (exit code, output, calls, results); a variable is an exit code."""
    tools, results, calls = tmp_path / "tools", tmp_path / "results", tmp_path / "calls"
    tools.mkdir()
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def call(**codes):
        named = {"PIP": 0, "NO_CUDA": 0, "CHECKS": 0, "BENCH": 0, "SANITIZER": 0} | codes
        environment = os.environ | {key: str(code) for key, code in named.items()}
        environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls),
                        "PYTHON": str(tools / "python")}  # fmt: skip
        done = subprocess.run(
            ["bash", SCRIPT, results], env=environment, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines(), results

    return call


def test_everything_passes(run):
    code, said, calls, results = run()
    assert code == 0, said
    assert {file.name for file in results.iterdir()} == FILES
    assert len(FILES) <= 8
    assert json.loads((results / "gpu.json").read_text()) == {}
    assert "| a table |" in said
    checks = [call for call in calls if "gpu_checks.py --part" in call]
    parts = {re.search(r"--part (\d)/(\d)", call).groups() for call in checks}
    assert len(parts) == len(checks) == int(next(iter(parts))[1]) >= 4
    assert "--no-index" in next(call for call in calls if "pip install" in call)
    assert [call for call in calls if call.startswith("compute-")] == [
        "compute-sanitizer memcheck", "compute-sanitizer memcheck", "compute-sanitizer racecheck",
    ]  # fmt: skip
    seconds = int(next(call for call in calls if "gpu_bench.py" in call).split()[-1])
    assert 500 < seconds <= 540
    assert (results / "checks.txt").read_text().count("1 checks passed") == len(checks)


def test_what_is_built_is_what_runs(run):
    """Away from the source tree, whose package comes first in its own folder; without a build that
    tree serves."""
    for code, place in ((0, r"[^|]*/site:"), (1, f"{ROOT}:")):
        calls = run(PIP=code)[2]
        info = [call for call in calls if call.endswith("-m shampoo_kernels info")][-1]
        folder, path, _ = info.split("|")
        assert Path(folder) != ROOT
        assert re.match(place, path)
        assert path.endswith(f":{ROOT}/bench")


@pytest.mark.parametrize(("part", "said"), [
    ("CHECKS", "checks"), ("BENCH", "benchmarks"), ("SANITIZER", "memcheck memcheck racecheck"),
])  # fmt: skip
def test_what_fails_is_said_and_the_rest_is_done(run, part, said):
    code, output, _, results = run(**{part: 9})
    assert code == 1
    assert re.search(rf"^FAILED: .*{said}", output, re.M)
    assert {file.name for file in results.iterdir()} == FILES


def test_without_cuda_cpp_there_is_nothing_of_it_to_sanitize(run):
    code, said, calls, _ = run(NO_CUDA=1)
    assert code == 0
    assert "CUDA C++ is not built" in said
    assert len([call for call in calls if call.startswith("compute-")]) == 1


def test_every_part_ends_by_the_tenth_minute():
    """`within most second`: parts follow each other in time, the last before 600."""
    ends = [int(x) for x in re.findall(r"within \d+ (\d+)|sanitize \w+ \d+ (\d+)",
                                       SCRIPT.read_text()) for x in x if x]  # fmt: skip
    assert ends == sorted(ends)
    assert len(ends) == 7
    assert ends[-1] <= 590
    assert SCRIPT.read_text().count("timeout ") == SCRIPT.read_text().count('timeout "$')


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_leaves_nothing(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", SCRIPT, tmp_path / "results"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "there is no GPU here" in done.stderr
    assert not (tmp_path / "results").exists()
