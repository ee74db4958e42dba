"""The kernels on a GPU: bench/gpu_checks.py, which gpu.sh also runs without pytest."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

CHECKS = Path(__file__).resolve().parents[1] / "bench/gpu_checks.py"

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


def load():
    sys.path.append(str(CHECKS.parent))  # it imports its neighbour
    spec = importlib.util.spec_from_file_location("gpu_checks", CHECKS)
    module = sys.modules["gpu_checks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_checks = load()


@pytest.mark.gpu
@pytest.mark.parametrize("name", gpu_checks.checks())
def test_on_the_gpu(name):
    gpu_checks.run(gpu_checks.checks()[name])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_checks_fail_and_say_so(capsys):
    assert gpu_checks.main([]) == 1
    assert "there is no GPU here: nothing was checked" in capsys.readouterr().err
