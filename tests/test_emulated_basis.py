"""power_iteration.cu and orthogonal_iteration.cu in emulation: against the references, on spectra
that lose rank, on bad blocks, under sanitizers."""

import functools

import emulation
import matrices
import pytest
import torch

from shampoo_kernels import orthogonal_iteration, power_iteration, use_backend

pytestmark = emulation.needs_compiler
FLOAT32, FLOAT64 = torch.float32, torch.float64
DTYPES = list(emulation.DTYPES)
SANITIZERS = pytest.mark.parametrize(
    "flags", [emulation.THREADS, emulation.ADDRESSES], ids=["races", "bounds"]
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("basis")
    return functools.cache(lambda name: emulation.build(folder, name))


def power_arguments(A, steps, vectors, turned=False):
    strides = (1, A.shape[1]) if turned else (A.shape[1], 1)
    return A.dtype, (*A.shape[:2], *strides, steps, vectors), emulation.raw(A)


def power(program, A, steps=3, vectors=16, turned=False):
    arguments = power_arguments(A, steps, vectors, turned)
    return emulation.call(program("power_iteration"), *arguments, (A.dtype, A.shape[:1]))[0]


def reference(function, *args):
    with use_backend("reference"):
        return function(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 17, pytest.param(48, marks=pytest.mark.slow)])
def test_power_iteration(program, n, dtype):
    """From below, and as far from the eigenvalue as the reference is: in exact arithmetic both find
    the same subspace."""
    made = matrices.families(n)
    blocks = [made[name] for name in ("condition 1e1", "nearly flat", "hilbert")]
    A = torch.stack([*blocks, 1e-30 * made["rank 1"], -1e30 * made["condition 1e2"]]).to(dtype)
    unit = torch.finfo(dtype).eps
    exact = torch.linalg.matrix_norm(A.double(), 2)
    for steps in (1, 4):
        found = power(program, A, steps, turned=True).double()
        assert (found <= exact * (1 + 8 * n * unit)).all()
        gap = 1 - found / exact
        assert (gap <= 1.05 * (1 - reference(power_iteration, A, steps) / exact) + 1e-5).all()


def test_power_iteration_with_few_vectors(program):
    A = torch.stack([matrices.condition(20, 10.0**k) for k in (1, 4)])
    for vectors in (1, 5):
        found = power(program, A, 3, vectors)
        expected = reference(power_iteration, A, 3, vectors)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_power_iteration_with_more_vectors_than_rows(program):
    """They act as n, whatever their number: 40 are more than a thread block could hold."""
    A = torch.stack([matrices.condition(9, 10.0**k) for k in (1, 4)])
    wanted = power(program, A, 3, 9)
    for vectors in (16, 40, 2**32 + 1):
        assert torch.equal(power(program, A, 3, vectors), wanted)
    refused = power_arguments(torch.eye(17)[None], 1, 17)
    assert emulation.start(program("power_iteration"), *refused).returncode == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [257, pytest.param(520, marks=pytest.mark.slow)])
def test_power_iteration_of_four_rows_a_thread(program, n, dtype):
    """From n = 257 on a thread holds more rows than one, some of which are beyond n."""
    A = matrices.condition(n, 10.0).to(dtype)[None]
    A = torch.cat([A, A.roll((n // 2, n // 2), (1, 2))])
    exact = torch.linalg.matrix_norm(A.double(), 2)
    found, expected = power(program, A, 1).double(), reference(power_iteration, A, 1).double()
    assert (found <= exact * (1 + 8 * n * torch.finfo(dtype).eps)).all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_power_iteration_of_bad_blocks(program):
    A = torch.stack([matrices.condition(18, 10.0)] * 6).float()
    good = power(program, A[:1])
    A[1, 2, 3], A[2, 0, 0], A[3, 17, 17], A[4] = torch.nan, torch.inf, -torch.inf, 0
    found = power(program, A)
    assert torch.equal(found[[0, 5]], good.expand(2))
    assert found[1:4].isnan().all()
    assert found[4] == 0


def basis_arguments(A, Q, steps):
    n = A.shape[1]
    lift = max(1e-8, min(64 * n * torch.finfo(A.dtype).eps, 0.125))
    data = emulation.raw(torch.tensor([lift]).double(), A, Q)
    return A.dtype, (*A.shape[:2], steps), data


def basis(program, A, Q, steps=1):
    shapes = (A.dtype, A.shape[:2]), (A.dtype, A.shape)
    return emulation.call(program("orthogonal_iteration"), *basis_arguments(A, Q, steps), *shapes)


def orthogonal(n, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, n, generator=generator, dtype=FLOAT64)
    return torch.linalg.qr(X).Q.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 7, 33, 48])
def test_orthogonal_iteration(program, n, dtype):
    """Orthonormal, with Rayleigh quotients of the new basis; and the reference's basis, to the
    rounding that a condition of 1/lift allows, where the columns are determined."""
    made = matrices.families(n)
    names = [x for x in ("condition 1e2", "condition 1e6", "rank 1", "identity") if x in made]
    A = torch.stack([made[name] for name in names]).to(dtype)
    Q = torch.stack([orthogonal(n, seed, dtype) for seed in range(len(names))])
    unit = torch.finfo(dtype).eps
    eigenvalues, new = basis(program, A, Q, 2)
    eye = torch.eye(n, dtype=dtype)
    assert ((new.mT @ new - eye).abs().amax((1, 2)) <= 10 * unit * n**0.5).all()
    rayleigh = (new.mT @ A @ new).diagonal(dim1=1, dim2=2)
    scale = A.abs().amax((1, 2), keepdim=True)[..., 0] * n**0.5
    assert ((eigenvalues - rayleigh).abs() <= 16 * unit * scale).all()
    one, expected = basis(program, A, Q)[1], reference(orthogonal_iteration, A, Q)[1]
    determined = torch.tensor([name in ("condition 1e2", "identity") for name in names])
    error = (one - expected).abs().amax((1, 2))[determined]
    assert (error <= 100 * 16 * n**0.5 * unit).all(), error


def test_orthogonal_iteration_completes_a_basis(program):
    """A Q of rank 2 and a lift of nothing, since qᵀAq = 0: the rest is any orthonormal basis."""
    A, Q = torch.zeros(1, 5, 5), torch.eye(5)[None]
    A[0, 0, 1] = A[0, 1, 0] = 1
    eigenvalues, new = basis(program, A, Q)
    torch.testing.assert_close(new.mT @ new, Q, rtol=0, atol=1e-6)
    torch.testing.assert_close(new[0, :2, :2].abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    torch.testing.assert_close(eigenvalues, torch.zeros(1, 5))


@pytest.mark.parametrize("steps", [1, 2])
def test_orthogonal_iteration_of_bad_blocks(program, steps):
    A = torch.stack([matrices.condition(7, 10.0)] * 8).float()
    Q = torch.stack([orthogonal(7, k, FLOAT32) for k in range(8)])
    Q[7] = Q[0]
    A[1, 2, 3], A[2, 0, 0], A[3] = torch.nan, torch.inf, 0
    Q[4, 1, 1], Q[5, 1, 1] = torch.nan, torch.inf
    A[6] = 3e38  # A Q overflows
    eigenvalues, new = basis(program, A, Q, steps)
    assert torch.equal(new[0], new[7])
    assert torch.equal(eigenvalues[0], eigenvalues[7])
    assert eigenvalues[0].isfinite().all()
    for k in (1, 2, 4, 5, 6):
        assert eigenvalues[k].isnan().all()
        torch.testing.assert_close(new[k], Q[k], rtol=0, atol=0, equal_nan=True)
    assert (eigenvalues[3] == 0).all()
    torch.testing.assert_close(new[3], Q[3])


CASES = {
    "power_iteration": power_arguments(matrices.condition(20, 10.0).float()[None], 1, 16),
    "orthogonal_iteration": basis_arguments(
        matrices.condition(34, 10.0).float()[None], orthogonal(34, 0, FLOAT32)[None], 1
    ),
}


@SANITIZERS
@pytest.mark.parametrize("name", CASES)
def test_sanitizers_find_nothing(tmp_path, name, flags):
    result = emulation.start(emulation.build(tmp_path, name, flags), *CASES[name])
    assert result.returncode == 0, result.stderr.decode()


FAULTS = {
    "power_iteration": ("  gram[r][c] = sum;\n  __syncthreads();\n", "  gram[r][c] = sum;\n"),
    "orthogonal_iteration": (
        "scratch);\n    }\n    __syncthreads();\n  }\n  if (k < n)",
        "scratch);\n    }\n  }\n  if (k < n)",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_missing_barrier_is_found(tmp_path, name):
    csrc = emulation.planted(tmp_path, f"{name}.cu", *FAULTS[name])
    program = emulation.build(tmp_path, name, emulation.THREADS, csrc)
    result = emulation.start(program, *CASES[name])
    assert result.returncode != 0
    assert "data race" in result.stderr.decode()
