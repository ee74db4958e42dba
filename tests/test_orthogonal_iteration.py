"""orthogonal_iteration: the SOAP basis step, its lift, its signs, its bad blocks."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shampoo_kernels import orthogonal_iteration


@functools.cache
def basis(n, seed=0):
    generator = torch.Generator().manual_seed(1000 * n + seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q


def with_spectrum(values, Q):
    A = Q * values @ Q.mT
    return (A + A.mT) / 2


def orthogonality(Q):
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().amax()


def off_diagonal(A, Q):
    D = Q.mT @ A @ Q
    return (D - torch.diag_embed(D.diagonal(dim1=-2, dim2=-1))).norm()


@pytest.mark.parametrize("n", [1, 2, 3, 8, 33, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormal_and_rayleigh(n, dtype):
    A = with_spectrum(torch.logspace(0, -6, n, dtype=torch.float64), basis(n)).to(dtype)
    eigenvalues, Q = orthogonal_iteration(A, basis(n, 1).to(dtype))
    u = torch.finfo(dtype).eps
    assert orthogonality(Q) <= 10 * u * n**0.5
    expected = (Q.mT @ A @ Q).diagonal()
    torch.testing.assert_close(eigenvalues, expected, rtol=0, atol=10 * u * n**0.5)


def test_is_the_textbook_step():
    """Q R = A Q_old with diag(R) > 0, where A is well conditioned and the lift is nothing."""
    n = 12
    A = with_spectrum(torch.linspace(1, 2, n, dtype=torch.float64), basis(n))
    _, Q = orthogonal_iteration(A, basis(n, 1))
    R = Q.mT @ A @ basis(n, 1)
    assert R.tril(-1).abs().max() < 1e-7  # the lift is 1e-8
    assert (R.diagonal() > 0).all()


def test_converges_to_the_eigenbasis():
    n = 10
    values = 2.0 ** -torch.arange(n, dtype=torch.float64)
    A = with_spectrum(values, basis(n))
    eigenvalues, Q = orthogonal_iteration(A, basis(n, 1), steps=200)
    torch.testing.assert_close(eigenvalues, values, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close((basis(n).mT @ Q).abs(), torch.eye(n, dtype=torch.float64))


def test_steps_compose():
    A, Q = with_spectrum(torch.rand(9, dtype=torch.float64), basis(9)), basis(9, 1)
    for _ in range(3):
        eigenvalues, Q = orthogonal_iteration(A, Q)
    torch.testing.assert_close(
        orthogonal_iteration(A, basis(9, 1), steps=3), (eigenvalues, Q), rtol=1e-12, atol=1e-14
    )


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 12), seed=st.integers(0, 10**6))
def test_every_step_brings_the_basis_closer(n, seed):
    """From a perturbed eigenbasis with separated eigenvalues, QᵀAQ becomes more diagonal."""
    values = 2.0 ** -torch.arange(n, dtype=torch.float64)
    A = with_spectrum(values, basis(n, seed))
    generator = torch.Generator().manual_seed(seed)
    noise = 1e-3 * torch.randn(n, n, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(basis(n, seed) + noise).Q
    _, new = orthogonal_iteration(A, Q)
    assert off_diagonal(A, new) < 0.8 * off_diagonal(A, Q)


def test_an_eigenbasis_is_a_fixed_point_with_its_signs():
    n = 16
    A = with_spectrum(torch.linspace(1, 3, n, dtype=torch.float64), basis(n)).float()
    signs = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0)
    Q = basis(n).float() * signs
    eigenvalues, new = orthogonal_iteration(A, Q)
    torch.testing.assert_close(new, Q, rtol=0, atol=1e-5)
    torch.testing.assert_close(eigenvalues, torch.linspace(1, 3, n), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lift_keeps_the_null_space(dtype):
    """Without the lift, QR fills the columns of the null space with an arbitrary basis."""
    n, rank = 24, 4
    values = torch.where(torch.arange(n) < rank, 1.0, 0.0).double()
    A = with_spectrum(values, basis(n)).to(dtype)
    Q = basis(n).to(dtype)
    eigenvalues, new = orthogonal_iteration(A, Q)
    # A's rounding error, at most u ‖A‖ (Frobenius, sqrt(rank)), over the lift tilts a direction.
    eps = torch.finfo(dtype).eps
    tilt = (new[:, rank:] - Q[:, rank:]).norm(dim=0).max()
    assert tilt <= eps / 2 * rank**0.5 / max(1e-8, 64 * n * eps)
    torch.testing.assert_close(eigenvalues, values.to(dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 24])
def test_lift_is_what_the_docstring_says(n, dtype):
    """A = e eᵀ, q 45 degrees off: (A + lift*I) q has the slope lift / (1 + lift). The largest
    estimate that the lift is relative to is qᵀAq = 1/2."""
    A, Q = torch.zeros(n, n, dtype=dtype), torch.eye(n, dtype=dtype)
    A[0, 0] = 1
    Q[:2, :2] = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=dtype) / 2**0.5
    _, new = orthogonal_iteration(A, Q)
    eps = torch.finfo(dtype).eps
    lift = max(1e-8, min(64 * n * eps, 1 / 8)) / 2
    assert (new[1, 0] / new[0, 0]).item() == pytest.approx(lift / (1 + lift), rel=4 * eps / lift)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales(scale):
    A, Q = (
        with_spectrum(torch.logspace(0, -4, 20).double(), basis(20)).float(),
        basis(20, 1).float(),
    )
    expected_eigenvalues, expected = orthogonal_iteration(A, Q)
    eigenvalues, new = orthogonal_iteration(A * scale, Q)
    torch.testing.assert_close(new, expected, rtol=0, atol=2e-3)  # u times the condition number
    torch.testing.assert_close(eigenvalues / scale, expected_eigenvalues, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_bad_blocks_touch_no_other(steps):
    A = torch.stack([with_spectrum(torch.rand(7).double() + 0.1, basis(7, k)) for k in range(8)])
    A, Q = A.float(), torch.stack([basis(7, 10 + k) for k in range(8)]).float()
    good_eigenvalues, good = orthogonal_iteration(A, Q, steps)
    A[1, 2, 3], A[2, 0, 0], A[3] = torch.nan, torch.inf, 0
    Q[4, 1, 1], Q[5, 1, 1] = torch.nan, torch.inf
    A[6] = 3e38  # A Q overflows
    eigenvalues, new = orthogonal_iteration(A, Q, steps)
    for k in (0, 7):
        assert torch.equal(eigenvalues[k], good_eigenvalues[k])
        assert torch.equal(new[k], good[k])
    for k in (1, 2, 4, 5, 6):
        assert eigenvalues[k].isnan().all()
        torch.testing.assert_close(new[k], Q[k], rtol=0, atol=0, equal_nan=True)
    assert (eigenvalues[3] == 0).all()
    torch.testing.assert_close(new[3], Q[3])


def test_arguments_are_not_changed():
    A, Q = with_spectrum(torch.rand(5).double(), basis(5)), basis(5, 1)
    copies = A.clone(), Q.clone()
    _, new = orthogonal_iteration(A, Q)
    assert torch.equal(A, copies[0])
    assert torch.equal(Q, copies[1])
    assert new.data_ptr() != Q.data_ptr()


@pytest.mark.parametrize(
    "shape", [(0, 3, 3), (2, 0, 0), (0, 0), (2, 0, 3, 3), (2, 3, 4, 4), (5, 5)]
)
def test_shapes(shape):
    A = torch.eye(shape[-1]).expand(shape)
    eigenvalues, Q = orthogonal_iteration(A, A)
    torch.testing.assert_close(eigenvalues, torch.ones(shape[:-1]))
    torch.testing.assert_close(Q, A.contiguous())


def test_strides():
    A, Q = with_spectrum(torch.rand(6).double(), basis(6)), basis(6, 1)
    wide = torch.full((2, 13, 13), torch.nan, dtype=torch.float64)
    wide[0, 1::2, 1::2], wide[1, :6, 3:9] = A, Q.mT
    torch.testing.assert_close(
        orthogonal_iteration(wide[0, 1::2, 1::2], wide[1, :6, 3:9].mT), orthogonal_iteration(A, Q)
    )


@pytest.mark.parametrize(("A", "Q", "steps", "error", "words"), [
    (torch.ones(3, 4), torch.ones(3, 4), 1, ValueError, r"A must be \(\*, n, n\), got \(3, 4\)"),
    (torch.ones(3, 3), torch.ones(4, 4), 1, ValueError, r"Q must be \(3, 3\) as A, got \(4, 4\)"),
    (torch.ones(3, 3), torch.ones(3, 3).double(), 1, TypeError, "Q must be float32, got"),
    (torch.ones(3, 3).half(), torch.ones(3, 3).half(), 1, TypeError, "A must be float64 or"),
    (torch.ones(3, 3), torch.ones(3, 3), 0, ValueError, "steps must be at least 1, got 0"),
    (torch.ones(3, 3), torch.ones(3, 3), 1.5, TypeError, "steps must be an int, got float"),
    (torch.ones(3, 3), torch.ones(3, 3).requires_grad_(), 1, ValueError, "Q requires grad"),
])  # fmt: skip
def test_errors(A, Q, steps, error, words):
    with pytest.raises(error, match=words):
        orthogonal_iteration(A, Q, steps)
