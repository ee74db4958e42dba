"""power_iteration and orthogonal_iteration on a CPU, a block per thread: against the reference, and
bits that do not depend on company or threads."""

import matrices
import pytest
import torch

from shampoo_kernels import native, orthogonal_iteration, power_iteration, use_backend

if native.lib is None:
    pytest.skip(f"no native kernels: {native.why_not}", allow_module_level=True)

DTYPES = [torch.float32, torch.float64]


def stack(n, dtype):
    made = matrices.families(n)
    names = ("condition 1e1", "condition 1e4", "nearly flat", "rank 1", "hilbert", "spiked")
    return torch.stack([made[name] for name in names]).to(dtype)


def orthogonal(n, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(X).Q.to(dtype)


def on_threads(count, function):
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "vectors"), [(1, 16), (5, 3), (33, 16), (130, 40)])
def test_power_iteration_is_as_close_as_the_reference(n, vectors, dtype):
    A = stack(n, dtype)
    exact = torch.linalg.matrix_norm(A.double(), 2)
    found = power_iteration(A, 4, vectors).double()
    with use_backend("reference"):
        expected = power_iteration(A, 4, vectors).double()
    assert (found <= exact * (1 + 8 * n * torch.finfo(dtype).eps)).all()
    assert (1 - found / exact <= 1.05 * (1 - expected / exact) + 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 33, 130])
def test_orthogonal_iteration_is_the_reference(n, dtype):
    """To the rounding that a condition of 1e4 allows; LAPACK's QR in both."""
    A = stack(n, dtype)[:1]
    Q = orthogonal(n, dtype)[None]
    eigenvalues, new = orthogonal_iteration(A, Q, 2)
    with use_backend("reference"):
        expected = orthogonal_iteration(A, Q, 2)
    tolerance = 1e3 * n**0.5 * torch.finfo(dtype).eps
    torch.testing.assert_close(new, expected[1], rtol=0, atol=tolerance)
    torch.testing.assert_close(eigenvalues, expected[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("n", [7, 65])
def test_bits_do_not_depend_on_company_or_threads(n):
    A = stack(n, torch.float32)
    Q = torch.stack([orthogonal(n, torch.float32, seed) for seed in range(len(A))])

    def everything(A, Q):
        return [power_iteration(A, 3), *orthogonal_iteration(A, Q, 2)]

    expected = on_threads(1, lambda: everything(A, Q))
    turned = A.mT.contiguous().mT, Q.mT.contiguous().mT
    for results in (
        on_threads(2, lambda: everything(A, Q)),
        everything(*turned),
        [x.flip(0) for x in everything(A.flip(0), Q.flip(0))],
    ):
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
    company = A.clone()
    company[1::2] = torch.nan
    for x, y in zip(everything(company, Q), expected, strict=True):
        assert torch.equal(x[::2], y[::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_blocks_are_shared_without_another_bit(dtype):
    """From 4e6 multiply-adds a product on, the last blocks of a stack keep all threads busy."""
    X = torch.randn(3, 530, 530, generator=torch.Generator().manual_seed(0), dtype=dtype)
    A = X @ X.mT
    expected = on_threads(1, lambda: power_iteration(A, 2))
    with use_backend("reference"):
        torch.testing.assert_close(expected, power_iteration(A, 2), rtol=1e-4, atol=0)
    for threads in (2, 3):
        assert torch.equal(on_threads(threads, lambda: power_iteration(A, 2)), expected)
        assert torch.equal(on_threads(threads, lambda: power_iteration(A[2:], 2)), expected[2:])
    bad = A.clone()
    bad[2, 400, 3] = torch.nan
    assert torch.equal(power_iteration(bad, 2)[:2], expected[:2])
    assert power_iteration(bad, 2)[2].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_power_iteration_scales_with_the_block(dtype):
    """Exactly by powers of two, blocks whose squares leave the range included."""
    A = stack(33, dtype)
    expected = power_iteration(A, 3)
    most = 100 if dtype == torch.float32 else 900
    for exponent in (-most, -33, -31, -1, 1, 31, 33, most):
        factor = torch.tensor(2.0, dtype=dtype) ** exponent
        assert torch.equal(power_iteration(A * factor, 3) / factor, expected), exponent
