"""The tests of the Triton kernels in triton's interpreter, in a process of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests run the kernels themselves")
@pytest.mark.parametrize("name", INTERPRETED)
def test_in_the_interpreter(name):
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", str(HERE / name)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
