"""The native bound and root ops themselves: strictness, error bounds against float64, statuses,
what a block without a root gets, bits."""

import math

import pytest
import torch

from shampoo_kernels import native

if native.lib is None:
    pytest.skip(f"no native kernels: {native.why_not}", allow_module_level=True)

ops = torch.ops.shampoo_kernels_native
NAN = math.nan
DTYPES = [torch.float32, torch.float64]
needs_lapack = pytest.mark.skipif(
    not native.lib.has_lapack(), reason="this torch exports no LAPACK"
)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def poisoned(A):
    """A with NaN above the diagonal."""
    return A.tril() + torch.full_like(A, NAN).triu(1)


def mirrored(A):
    return A.tril() + A.tril(-1).mT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("n", [1, 2, 33, 130])
def test_bound_is_strict_and_close(dtype, scale, n):
    X = random(n, n)
    zero_row = X @ X.mT
    zero_row[n // 2] = zero_row[:, n // 2] = 0
    flat = torch.eye(n, dtype=torch.float64)
    A = torch.stack([flat, flat + 1e-6 * X, torch.ones_like(X), X, X @ X.mT, zero_row, -flat])
    A = (mirrored(A) * scale).to(dtype)
    largest = torch.linalg.eigvalsh(A.double() / scale)[:, -1]
    for layout in (poisoned(A), poisoned(A).mT.contiguous().mT):
        bound = ops.eigenvalue_bound(layout).double() / scale
        assert (bound >= largest).all()
        assert (bound <= 1.02 * torch.linalg.matrix_norm(A.double() / scale)).all()


def test_bound_of_poisoned_and_empty_blocks():
    A = torch.zeros(5, 3, 3)
    A[1, 2, 0], A[2, 2, 1], A[3, 1, 1] = NAN, math.inf, 4.0
    A[4, 0, 2] = NAN  # above the diagonal
    want = torch.tensor([0.0, NAN, math.inf, 4.04, 0.0])
    torch.testing.assert_close(ops.eigenvalue_bound(A), want, equal_nan=True)
    assert torch.equal(ops.eigenvalue_bound(torch.zeros(2, 0, 0)), torch.zeros(2))
    assert ops.eigenvalue_bound(torch.zeros(0, 3, 3)).shape == (0,)


def root_of(A, p=2.0, ridge=1e-6, rank_rtol=None, previous=None, root=None, scale=None):
    root = torch.empty_like(A, memory_format=torch.contiguous_format) if root is None else root
    residual = A.new_full(A.shape[:1], NAN)
    status = torch.full(A.shape[:1], -1, dtype=torch.int8)
    ops.inverse_root_eigh_(A, p, ridge, rank_rtol, scale, previous, root, residual, status)
    return root, residual, status


def with_condition(n, kappa, seed=0):
    Q = torch.linalg.qr(random(n, n, seed=seed)).Q
    return mirrored((Q * torch.logspace(0, -math.log10(kappa), n, dtype=torch.float64)) @ Q.mT)


@needs_lapack
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1.0, 2.0, 2.5, 4.0])
@pytest.mark.parametrize("n", [1, 3, 33, 130])
def test_root_error(dtype, p, n):
    """Eigenvalues are off by n u |A|, which the root magnifies by kappa / p."""
    u, kappa = torch.finfo(dtype).eps / 2, 1e3
    for scale in (1e-30, 1.0, 1e30):
        A = (scale * torch.stack([with_condition(n, kappa, b) for b in range(3)])).to(dtype)
        root, residual, status = root_of(poisoned(A), p)
        assert torch.equal(root, root.mT)
        assert status.tolist() == [0, 0, 0]
        assert residual.tolist() == [0, 0, 0]
        unit = A.double() / scale
        lambdas, V = torch.linalg.eigh(unit)
        lambdas = lambdas + 1e-6 * ops.eigenvalue_bound(unit)[:, None]
        want = (V * lambdas.pow(-1 / p)[:, None, :]) @ V.mT
        error = torch.linalg.matrix_norm(root.double() * scale ** (1 / p) - want, 2)
        assert (error <= 4 * n * u * kappa / p * torch.linalg.matrix_norm(want, 2)).all()


@needs_lapack
def test_root_with_rank_rtol_is_the_pseudo_inverse():
    X = random(40, 7)
    A = (X @ X.mT)[None]
    root, _, status = root_of(A, p=1.0, ridge=0.0, rank_rtol=1e-10)
    assert status.tolist() == [0]
    torch.testing.assert_close(root, torch.linalg.pinv(A, hermitian=True), rtol=1e-9, atol=1e-12)


def bad_blocks(dtype):
    eye = torch.eye(5, dtype=dtype)
    nan, inf, indefinite = eye.clone(), eye.clone(), eye.clone()
    nan[3, 1], inf[4, 4], indefinite[2, 2] = NAN, math.inf, -0.5
    return torch.stack([torch.zeros_like(eye), nan, inf, -eye, indefinite, 4 * eye])


@needs_lapack
@pytest.mark.parametrize("dtype", DTYPES)
def test_root_of_a_block_without_one(dtype):
    A = bad_blocks(dtype)
    eye = torch.eye(5, dtype=dtype)
    root, residual, status = root_of(A)
    assert status.tolist() == [3, 3, 3, 3, 3, 0]
    assert residual.tolist() == [math.inf] * 5 + [0]
    assert torch.equal(root[:4], eye.expand(4, 5, 5))
    bound = ops.eigenvalue_bound(A[4:5])
    torch.testing.assert_close(root[4], eye * bound ** (-1 / 2))
    torch.testing.assert_close(root[5], eye / 2, rtol=2e-6, atol=0)

    previous = random(6, 5, 5, dtype=dtype)
    previous[1, 0, 4] = NAN
    for kept in (previous, previous.mT.contiguous().mT, previous.clone()):
        out = kept if kept.is_contiguous() else None
        before = kept.clone()
        got, residual, status = root_of(A, previous=kept, root=out)
        assert status.tolist() == [2, 3, 2, 2, 2, 0]
        assert torch.equal(got[[0, 2, 3, 4]], before[[0, 2, 3, 4]])
        assert torch.equal(got[1], eye)
        assert torch.equal(got[5], root[5])


@needs_lapack
def test_root_accepts_what_the_ridge_explains():
    A = torch.diag_embed(torch.tensor([[1.0, 1.0, -5e-4], [1.0, 1.0, -5e-3]]))
    _, _, status = root_of(A, ridge=1e-3)
    assert status.tolist() == [0, 3]
    _, _, status = root_of(A, ridge=0.0, rank_rtol=1e-3)
    assert status.tolist() == [0, 3]


@needs_lapack
def test_root_bits_do_not_depend_on_company_or_threads():
    threads = torch.get_num_threads()
    A = torch.stack([with_condition(65, 1e4, b) for b in range(5)]).float()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(root_of(A)[0])
            results.append(torch.cat([root_of(A[b : b + 1])[0] for b in range(5)]))
            results.append(root_of(A.flip(0))[0].flip(0))
            results.append(root_of(A.mT.contiguous().mT)[0])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result, results[0])
    A[1], A[3] = NAN, 0
    assert torch.equal(root_of(A)[0][[0, 2, 4]], results[0][[0, 2, 4]])


@needs_lapack
def test_root_leaves_torch_threads_and_lapack_as_they_were():
    A = with_condition(200, 1e2)
    before = torch.linalg.eigh(A)
    threads = torch.get_num_threads()
    root_of(A[None])
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.linalg.eigh(A).eigenvectors, before.eigenvectors)
