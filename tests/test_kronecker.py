"""The cosines against the dense H and the SVD of its rearrangement, and the laws they obey."""

import pytest
import torch
from dense import (
    dense_cosine,
    exactly_kronecker,
    gradients,
    rearranged,
    second_moment,
    spd,
    square_root,
)

from shampoo_kernels.study.kronecker import Cosines, cosine, cosines, optimal_kronecker, unit

# float64 sums of at most 1e5 products of size 1: 1e5 * 2^-53 = 1e-11 before the square roots.
TOLERANCE = 1e-10
SHAPES = [(1, 4, 5), (3, 1, 6), (3, 6, 1), (7, 3, 3), (40, 4, 5), (60, 8, 3), (5, 1, 1)]


def truth(grads):
    m, n = grads.shape[1:]
    H = second_moment(grads)
    singular = torch.linalg.svdvals(rearranged(H, m, n))
    left = torch.einsum("bij,bkj->ik", grads, grads)
    right = torch.einsum("bji,bjk->ik", grads, grads)
    return Cosines(
        float(singular[0] / singular.norm()),
        dense_cosine(H, left, right),
        dense_cosine(H, square_root(left), square_root(right)),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_cosines_against_dense(shape, seed):
    grads = gradients(*shape, seed)
    assert cosines(grads) == pytest.approx(truth(grads), abs=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_cosine_of_any_pair_against_dense(shape):
    grads = gradients(*shape)
    generator = torch.Generator().manual_seed(3)
    left, right = (
        torch.randn(k, k, generator=generator, dtype=torch.float64) for k in shape[1:]
    )  # not even symmetric
    expected = dense_cosine(second_moment(grads), left, right)
    assert cosine(grads, left, right) == pytest.approx(expected, abs=TOLERANCE)


def test_chunks_change_nothing(monkeypatch):
    grads = gradients(23, 4, 5)
    whole = cosines(grads)
    monkeypatch.setattr("shampoo_kernels.study.gradients.CHUNK", 100)  # 5 rows, 4 rows of the Gram
    assert cosines(grads) == pytest.approx(whole, abs=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_optimal_factors_are_the_leading_singular_pair(shape):
    _, m, n = shape
    grads = gradients(*shape)
    best = optimal_kronecker(grads, tol=1e-12)
    u, sigma, vt = torch.linalg.svd(rearranged(second_moment(grads), m, n))
    assert best.converged
    assert best.sigma == pytest.approx(float(sigma[0]), rel=TOLERANCE)
    # mat() column by column; the sign of a singular pair is free, that of a PSD factor is not.
    for factor, vector, size in ((best.left, u[:, 0], m), (best.right, vt[0], n)):
        expected = vector.reshape(size, size).mT
        expected = expected * torch.sign(expected.trace())
        torch.testing.assert_close(factor, expected, rtol=0, atol=TOLERANCE)
        assert float(torch.linalg.eigvalsh(factor).min()) > -TOLERANCE


def test_optimal_product_is_the_nearest_one():
    grads = gradients(40, 4, 5)
    H = second_moment(grads)
    best = optimal_kronecker(grads)
    distance = (H - best.sigma * torch.kron(best.right, best.left)).norm()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        left, right = (
            factor + 1e-3 * torch.randn(factor.shape, generator=generator, dtype=torch.float64)
            for factor in (best.left, best.right)
        )
        assert distance < (H - best.sigma * torch.kron(right, left)).norm()


@pytest.mark.parametrize(("m", "n"), [(2, 3), (4, 5), (6, 6)])
def test_exactly_kronecker_is_recovered(m, n):
    grads, A, B = exactly_kronecker(m, n)
    torch.testing.assert_close(second_moment(grads), torch.kron(B, A))
    got = cosines(grads)
    assert got.optimal == pytest.approx(1, abs=TOLERANCE)
    assert got.shampoo_squared == pytest.approx(1, abs=TOLERANCE)
    assert got.shampoo < 1 - 1e-3
    assert cosine(grads, A, B) == pytest.approx(1, abs=TOLERANCE)
    best = optimal_kronecker(grads)
    torch.testing.assert_close(best.sigma * torch.kron(best.right, best.left), torch.kron(B, A))


@pytest.mark.parametrize("shape", SHAPES)
def test_optimal_is_never_below_the_others(shape):
    for seed in range(5):
        got = cosines(gradients(*shape, seed))
        assert 0 < got.shampoo <= got.optimal + TOLERANCE
        assert 0 < got.shampoo_squared <= got.optimal + TOLERANCE
        assert got.optimal <= 1 + TOLERANCE


@pytest.mark.parametrize("scale", [1e-70, 1e-30, 1e30, 1e70])
def test_scale_does_not_matter(scale):
    grads = gradients(20, 4, 5)
    assert cosines(scale * grads) == pytest.approx(cosines(grads), abs=TOLERANCE)
    left, right = spd(4, 1), spd(5, 2)
    expected = cosine(grads, left, right)
    assert cosine(scale * grads, left / scale, right) == pytest.approx(expected, abs=TOLERANCE)
    ratio = optimal_kronecker(scale * grads).sigma / optimal_kronecker(grads).sigma
    assert ratio == pytest.approx(scale**2, rel=TOLERANCE)


def test_transposing_swaps_the_factors():
    grads = gradients(20, 4, 6)
    assert cosines(grads.mT) == pytest.approx(cosines(grads), abs=TOLERANCE)


def test_rank_deficient():
    """Rank-1 gradients from a plane: L has rank 2 of 6, and rounding makes eigenvalues negative."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    left = torch.randn(30, 2, 1, generator=generator, dtype=torch.float64)
    right = torch.randn(30, 1, 5, generator=generator, dtype=torch.float64)
    grads = plane @ left @ right
    assert torch.linalg.matrix_rank(torch.einsum("bij,bkj->ik", grads, grads)) == 2
    # An eigenvalue of 1e-17 has a root of 3e-9: the square root is exact to that much only.
    assert cosines(grads) == pytest.approx(truth(grads), abs=1e-7)


def test_one_rank_one_gradient_is_its_own_kronecker_product():
    row, column = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([2.0, 0.5])
    got = cosines(torch.outer(row, column)[None])
    assert got == pytest.approx((1, 1, 1), abs=TOLERANCE)


def test_low_precision_gradients_are_read_exactly():
    grads = gradients(20, 4, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = grads.to(dtype)
        assert cosines(rounded) == pytest.approx(cosines(rounded.double()), abs=TOLERANCE)


def test_norms_of_large_float32_factors():
    """Rounding of the entries alone, 2^-24 each, is left: a float32 sum of squares adds 1e-5."""
    A = torch.rand(784, 784, generator=torch.Generator().manual_seed(0))
    assert float(unit(A).double().norm()) == pytest.approx(1, abs=2**-22)


def test_steps_stop_at_the_limit_and_say_so():
    grads = gradients(40, 4, 5)
    one, many = optimal_kronecker(grads, max_steps=1), optimal_kronecker(grads)
    assert (one.steps, one.converged) == (1, False)
    assert many.converged
    assert 1 < many.steps < 1000
    assert one.sigma < many.sigma


good = torch.ones(3, 2, 4)


@pytest.mark.parametrize(
    ("grads", "error", "words"),
    [
        (torch.zeros(3, 2, 4), ValueError, "grads is zero everywhere"),
        (torch.ones(2, 4), ValueError, r"must be \(N, m, n\), none of them 0, got \(2, 4\)"),
        (torch.ones(0, 2, 4), ValueError, r"none of them 0, got \(0, 2, 4\)"),
        (torch.full((3, 2, 4), float("nan")), ValueError, "finite"),
        (torch.full((3, 2, 4), float("inf")), ValueError, "finite"),
        (torch.ones(3, 2, 4, dtype=torch.int64), TypeError, "got .* int64"),
        ([[[1.0]]], TypeError, "must be a tensor, got list"),
        (torch.ones(3, 2, 4, requires_grad=True), ValueError, "requires grad"),
    ],
)
def test_bad_gradients(grads, error, words):
    for op in (cosines, optimal_kronecker, lambda g: cosine(g, torch.eye(2), torch.eye(4))):
        with pytest.raises(error, match=words):
            op(grads)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cosine(good, torch.eye(3), torch.eye(4)), r"left must be \(2, 2\), got \(3, 3\)"),
        (lambda: cosine(good, torch.eye(2), torch.eye(2)), r"right must be \(4, 4\), got \(2, 2\)"),
        (lambda: cosine(good, torch.zeros(2, 2), torch.eye(4)), "left is zero everywhere"),
        (lambda: optimal_kronecker(good, tol=-1.0), "tol must be at least 0, got -1.0"),
        (lambda: optimal_kronecker(good, tol=float("nan")), "tol must be at least 0, got nan"),
        (lambda: optimal_kronecker(good, max_steps=0), "max_steps must be at least 1, got 0"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
