"""The launchers of csrc/kernels.h from a C++ program without torch, as csrc/examples shows it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "csrc/examples/gram_and_bound.cpp"

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not SOURCE.exists() or os.uname().machine != "x86_64",
    reason="needs g++ on x86-64 and the sources",
)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> np.ndarray:
    """What the example prints, compiled by the commands in its own comment."""
    out = tmp_path_factory.mktemp("example")
    recipe = re.findall(r"^//   (.*)$", SOURCE.read_text(), re.MULTILINE)
    assert sum(line.startswith("g++") for line in recipe) == 3
    script = "set -euo pipefail\n" + "\n".join(recipe).replace("-O2", "-O0")  # compiles sooner
    subprocess.run(["bash", "-c", script], check=True, cwd=ROOT, env=os.environ | {"OUT": str(out)})
    program = [str(out / "gram_and_bound")]
    printed = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    return np.array(printed.split(), dtype=np.float64)


def statistics() -> np.ndarray:
    """The example's L in float64, from its gradients, which float32 holds exactly."""
    grad = (np.arange(3 * 40 * 56) * 37 % 101 / 64 - 0.75).reshape(3, 40, 56)
    beta, alpha = float(np.float32(0.9)), float(np.float32(0.1))
    return (1 + beta) * alpha * grad @ grad.swapaxes(1, 2)


def test_the_statistics_are_those_of_float64(numbers):
    stats = numbers[3:].reshape(3, 40, 40)
    grad = np.abs(np.arange(3 * 40 * 56) * 37 % 101 / 64 - 0.75).reshape(3, 40, 56)
    # float32 sums of 56 products and two updates, in units of |G| |G|^T: 60 roundings at the most
    tolerance = 60 * 2.0**-24 * 0.19 * grad @ grad.swapaxes(1, 2)
    assert (np.abs(stats - statistics()) <= tolerance).all()
    assert (stats == stats.swapaxes(1, 2)).all()


def test_the_bounds_are_above_the_eigenvalues(numbers):
    largest = np.linalg.eigvalsh(statistics())[:, -1]
    frobenius = np.linalg.norm(statistics(), axis=(1, 2))
    assert (numbers[:3] >= largest).all()
    assert (numbers[:3] <= 1.01 * frobenius * (1 + 60 * 2.0**-24)).all()


def test_torch_is_nowhere_in_it():
    included = [SOURCE, ROOT / "csrc/kernels.h", *ROOT.glob("csrc/cpu/*")]
    for file in included:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", file.read_text()), file
