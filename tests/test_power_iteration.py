"""power_iteration: a lower estimate, close on every spectrum, one block at a time."""

import functools
import itertools

import pytest
import torch

from shampoo_kernels import power_iteration


@functools.cache
def basis(n, seed=0):
    generator = torch.Generator().manual_seed(100 * n + seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q


def spectrum(values, seed=0):
    Q = basis(len(values), seed)
    A = Q * values.double() @ Q.mT
    return (A + A.mT) / 2


def norm(A):
    return torch.linalg.eigvalsh(A.double()).abs().amax(-1)


def assert_close_below(estimate, A, rtol):
    """At most the float64 norm but for the rounding of n sums, at least (1 - rtol) of it."""
    truth = norm(A)
    u = torch.finfo(A.dtype).eps
    assert (estimate.double() <= truth * (1 + 4 * u * A.shape[-1] ** 0.5)).all()
    assert (estimate.double() >= truth * (1 - rtol)).all(), estimate.double() / truth


@pytest.mark.parametrize(
    ("n", "dtype"), [*itertools.product((4, 16, 64, 130), (torch.float32, torch.float64)),
                 (512, torch.float32)]
)  # fmt: skip
def test_condition_numbers(n, dtype):
    """Log-uniform spectra of condition 10 to 1e10; slower decay, wider tolerance."""
    A = torch.stack([spectrum(torch.logspace(0, -k, n), k) for k in (1, 2, 4, 7, 10)]).to(dtype)
    estimate = power_iteration(A)
    assert_close_below(estimate, A, 0.03)
    assert_close_below(estimate[2:], A[2:], 0.005)
    assert_close_below(power_iteration(A, 100), A, 0.005)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 17, 128])
def test_families(n):
    ramp = torch.arange(1, n + 1, dtype=torch.float64)
    A = torch.stack([
        1 / (ramp[:, None] + ramp - 1),  # Hilbert
        torch.eye(n, dtype=torch.float64),
        torch.ones(n, n, dtype=torch.float64),
        torch.diag((ramp == n).double()),
        spectrum(torch.where(ramp > n - 3, ramp, 0.0)),  # rank 3 at most
        spectrum(-(0.5**ramp)),  # the norm, where no eigenvalue is positive
    ])  # fmt: skip
    assert_close_below(power_iteration(A), A, 1e-6)
    assert_close_below(power_iteration(A.float()), A.float(), 1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_scales(scale):
    A = (spectrum(torch.logspace(0, -4, 20)) * scale).float()
    assert_close_below(power_iteration(A), A, 0.01)


def test_largest_floats():
    A = torch.full((3, 3), 1e38)
    assert power_iteration(A).item() == pytest.approx(3e38, rel=1e-5)
    assert power_iteration(torch.full((2, 2), 2.0**-148)).item() == pytest.approx(2.0**-147)


def test_one_vector_and_one_step():
    A = spectrum(torch.logspace(0, -1, 40))
    assert_close_below(power_iteration(A, vectors=1), A, 0.1)
    assert_close_below(power_iteration(A, steps=1), A, 0.2)
    assert power_iteration(A, 2) <= power_iteration(A, 20)


def test_sixteen_vectors_beat_one():
    A = torch.stack([spectrum(1 / torch.arange(1.0, 201), k) for k in range(5)])
    assert (power_iteration(A, 4, 16) > power_iteration(A, 4, 1)).all()


def test_deterministic():
    A = spectrum(torch.rand(30, generator=torch.Generator().manual_seed(1))).float()
    torch.manual_seed(1)
    first = power_iteration(A)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(power_iteration(A), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # no number was drawn


def test_bad_blocks_touch_no_other():
    A = torch.stack([spectrum(torch.rand(9) + 0.1, k) for k in range(6)]).float()
    good = power_iteration(A)
    A[1, 2, 3], A[2, 0, 0], A[3, 8, 8] = torch.nan, torch.inf, -torch.inf
    A[4] = 0
    estimate = power_iteration(A)
    assert torch.equal(estimate[[0, 5]], good[[0, 5]])
    assert estimate[1:4].isnan().all()
    assert estimate[4] == 0


@pytest.mark.parametrize(
    "shape", [(0, 3, 3), (2, 0, 0), (0, 0), (2, 0, 3, 3), (2, 3, 4, 4), (5, 5)]
)
def test_shapes(shape):
    estimate = power_iteration(torch.ones(shape))
    assert estimate.shape == shape[:-2]
    torch.testing.assert_close(estimate, torch.full(shape[:-2], float(shape[-1])))


def test_strides():
    A = torch.stack([spectrum(torch.rand(9) + 0.1, k) for k in range(4)]).float()
    wide = torch.full((4, 20, 30), torch.nan)
    wide[:, 1:19:2, 3:30:3] = A
    assert torch.equal(power_iteration(wide[:, 1:19:2, 3:30:3]), power_iteration(A))


@pytest.mark.parametrize(("A", "steps", "vectors", "error", "words"), [
    (torch.ones(3, 4), 1, 1, ValueError, r"A must be \(\*, n, n\), got \(3, 4\)"),
    (torch.ones(3, 3).bfloat16(), 1, 1, TypeError, "A must be float64 or float32"),
    (torch.ones(3, 3), 0, 1, ValueError, "steps must be at least 1, got 0"),
    (torch.ones(3, 3), 1, 0, ValueError, "vectors must be at least 1, got 0"),
    (torch.ones(3, 3), 1.0, 1, TypeError, "steps must be an int, got float"),
    (torch.ones(3, 3), 1, True, TypeError, "vectors must be an int, got bool"),
    (torch.ones(3, 3).requires_grad_(), 1, 1, ValueError, "A requires grad"),
])  # fmt: skip
def test_errors(A, steps, vectors, error, words):
    with pytest.raises(error, match=words):
        power_iteration(A, steps, vectors)
