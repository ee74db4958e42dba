"""eigenvalue_bound.cu in emulation, one thread per CUDA thread (csrc/emulate)."""

import re

import emulation
import pytest
import torch

from shampoo_kernels import eigenvalue_bound, use_backend

DTYPES = list(emulation.DTYPES)

pytestmark = emulation.needs_compiler


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return emulation.build(tmp_path_factory.mktemp("emulated"), "eigenvalue_bound")


def arguments(A: torch.Tensor):
    entries = bytes(A.untyped_storage())[A.storage_offset() * A.element_size() :]
    return A.dtype, (*A.shape[:2], *A.stride()), entries


def emulated(program, A: torch.Tensor) -> torch.Tensor:
    return emulation.call(program, *arguments(A), (A.dtype, A.shape[:1]))[0]


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 33, 48])
def test_agrees_with_the_reference(program, n, dtype):
    # Both sum n² terms in double and round up once, so they differ by the last place at the most;
    # the kernel adds 4 n eps |A|_F to the Wolkowicz-Styan bound, which may be near zero.
    A = stack(n, dtype)
    result, expected = emulated(program, A), reference(A)
    tolerance = torch.finfo(dtype).eps if dtype == torch.float32 else 4 * n * n * 2.0**-53
    frobenius = torch.linalg.matrix_norm((A.tril() + A.tril(-1).mT).double())
    most = tolerance * expected.abs() + 4.1 * n * 2.0**-52 * frobenius
    sick = ~expected.isfinite()
    torch.testing.assert_close(result[sick], expected[sick], rtol=0, atol=0, equal_nan=True)
    assert ((result - expected).abs() <= most)[~sick].all()


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


@pytest.mark.parametrize("flags", [emulation.THREADS, emulation.ADDRESSES], ids=["races", "bounds"])
def test_sanitizers_find_nothing(tmp_path, flags):
    program = emulation.build(tmp_path, "eigenvalue_bound", flags)
    A = stack(32, torch.float32)[:3]
    torch.testing.assert_close(emulated(program, A), reference(A), rtol=2.0**-23, atol=0)


KERNELS = sorted((emulation.CSRC / "cuda").glob("*.cu"))


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: file.stem)
def test_every_kernel_says_what_only_a_gpu_can_prove(file):
    """And names the tests of the rest, which are there."""
    text = " ".join(line.removeprefix("// ") for line in file.read_text().splitlines())
    assert "Proven in emulation: " in text
    assert "Unproven until run on a GPU: " in text
    named = re.findall(r"tests/test_\w+\.py", text)
    assert named
    assert all((emulation.CSRC.parent / name).exists() for name in named)
