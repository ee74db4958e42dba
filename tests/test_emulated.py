"""The CUDA C++ kernels, compiled as plain C++ with one thread per CUDA thread (csrc/emulate)."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from shampoo_kernels import eigenvalue_bound, use_backend

CSRC = Path(__file__).resolve().parents[1] / "csrc"
CXX = shutil.which("g++") or shutil.which("clang++")
SANITIZED = ["-O1", "-g", "-fsanitize=thread"]
NAMES = {torch.float32: "float", torch.float64: "double"}

pytestmark = pytest.mark.skipif(
    CXX is None or not CSRC.exists(), reason="needs a C++ compiler and the sources"
)


def build(folder: Path, *flags: str) -> Path:
    source, program = CSRC / "emulate/eigenvalue_bound.cpp", folder / "eigenvalue_bound"
    includes = [f"-I{CSRC / 'emulate'}", f"-I{CSRC}"]
    command = [CXX, "-std=c++20", "-pthread", *flags, *includes, str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulated"), "-O2")


def emulated(program: Path, A: torch.Tensor) -> torch.Tensor:
    sizes = [A.shape[0], A.shape[1], *A.stride()]
    entries = bytes(A.untyped_storage())[A.storage_offset() * A.element_size() :]
    command = [str(program), NAMES[A.dtype], *map(str, sizes)]
    result = subprocess.run(command, input=entries, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    raw = bytearray(result.stdout)
    return torch.frombuffer(raw, dtype=A.dtype) if raw else A.new_empty(0)


def reference(A: torch.Tensor) -> torch.Tensor:
    with use_backend("reference"):
        return eigenvalue_bound(A)


def stack(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Flat, spiked, zero, zero-row, indefinite, tiny, huge, NaN and Inf blocks, and a full one."""
    G = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    full = G @ G.mT
    spiked = 1e-4 * torch.eye(n, dtype=torch.float64)
    spiked[n // 2, n // 2] = 1
    holes = full.clone()
    holes[::3] = 0
    holes[:, ::3] = 0
    sick = [full.clone(), full.clone()]
    sick[0][n - 1, 0], sick[1][n - 1, n // 2] = torch.nan, torch.inf
    ordinary = [full, torch.eye(n).double(), torch.ones(n, n), spiked, holes, G + G.mT, -full]
    scaled = [full * 1e-30, full * 1e30, torch.zeros(n, n)]
    return torch.stack([block.to(dtype) for block in ordinary + scaled + sick])


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("n", [1, 2, 33, 48])
def test_agrees_with_the_reference(program, n, dtype):
    # Both sum n² terms in double and round up once, so they differ by the last place at the most.
    A = stack(n, dtype)
    result, expected = emulated(program, A), reference(A)
    tolerance = torch.finfo(dtype).eps if dtype == torch.float32 else 4 * n * n * 2.0**-53
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=0, equal_nan=True)


def test_is_above_the_eigenvalue_and_near_it(program):
    A = stack(33, torch.float32)[:9]
    largest = torch.linalg.eigvalsh(A.double())[:, -1]
    result = emulated(program, A).double()
    assert (result >= largest).all()
    # Frobenius: at most sqrt(n) times the spectral radius
    radius = torch.linalg.eigvalsh(A.double()).abs().amax(-1)
    assert (result <= 1.02 * 33**0.5 * radius).all()


def test_strides_and_the_upper_triangle(program):
    A = stack(17, torch.float32)
    expected = emulated(program, A)
    poisoned = torch.full((len(A), 2, 18, 40), torch.nan)
    for view in (poisoned[:, 1, :17, 1:35:2], poisoned[:, 0, :17, :17].mT):
        view.copy_(A.tril() + torch.full_like(A, torch.nan).triu(1))
        torch.testing.assert_close(
            emulated(program, view), expected, rtol=0, atol=0, equal_nan=True
        )


def test_a_strip_holds_128_columns(program):
    # 130 columns: two strips, the second of which is nearly empty
    A = stack(130, torch.float64)[:1]
    torch.testing.assert_close(emulated(program, A), reference(A), rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 0)])
def test_empty(program, shape):
    assert torch.equal(emulated(program, torch.empty(shape)), torch.zeros(shape[0]))


def test_threads_do_not_race(tmp_path):
    program = build(tmp_path, *SANITIZED)
    A = stack(32, torch.float32)[:3]
    torch.testing.assert_close(emulated(program, A), reference(A), rtol=2.0**-23, atol=0)
