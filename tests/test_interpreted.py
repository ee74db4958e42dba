"""The tests of the Triton kernels in triton's interpreter, in two processes of their own."""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED

HERE = Path(__file__).resolve().parent


def version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in metadata.version(package).split(".")[:2])


def broken() -> bool:
    found = all(importlib.util.find_spec(package) for package in ("triton", "numpy"))
    return found and version("triton") < (3, 7) and version("numpy") >= (2, 4)


pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.skipif(broken(), reason="the interpreter of triton 3.6 fails with numpy 2.4"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, test_gpu.py runs the kernels"),
]


def run(name: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", str(HERE / name)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs(request):
    names = [item.callspec.params["name"] for item in request.session.items
             if item.originalname == "test_in_the_interpreter"]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, name) for name in names}


@pytest.mark.parametrize("name", INTERPRETED)
def test_in_the_interpreter(name, runs):
    result = runs[name].result()
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
