"""Singular values of the rearranged H, power steps and the bound: their laws, and the dense SVD."""

import itertools
import math

import pytest
import torch
from dense import exactly_kronecker, gradients, rearranged, second_moment

from shampoo_kernels import kronecker_power_step
from shampoo_kernels.study import (
    cosine,
    cosine_bound,
    optimal_kronecker,
    power_steps,
    singular_values,
)

TOLERANCE = 1e-10  # float64 sums of at most 1e5 products of size 1: 1e5 * 2^-53 = 1e-11
SHAPES = [(40, 4, 5), (60, 8, 3), (7, 3, 3), (9, 1, 6), (9, 6, 1)]


def test_exactly_kronecker_has_one_singular_value():
    grads, A, B = exactly_kronecker(4, 5)
    found = singular_values(grads, 3)
    assert found.first == pytest.approx(float(A.norm() * B.norm()), rel=TOLERANCE)
    assert found.second < 1e-12 * found.first
    assert found.converged


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_singular_values_against_dense(shape, seed):
    values = gradients(*shape, seed)
    expected = torch.linalg.svdvals(rearranged(second_moment(values), *shape[1:]))
    expected = [*expected.tolist(), 0.0][:2]
    found = singular_values(values)
    assert found.converged
    assert [found.first, found.second] == pytest.approx(expected, abs=TOLERANCE * expected[0])


def test_singular_value_of_antisymmetric_matrices():
    """G = a rotation of the plane: Ĥ has sigma_1 = 1 on I and 1 on the antisymmetric matrix too."""
    angles = torch.linspace(0, 2 * math.pi, 9, dtype=torch.float64)[:-1]
    c, s = angles.cos(), angles.sin()
    values = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
    found = singular_values(values)
    assert (found.first, found.antisymmetric) == pytest.approx((1, 1), abs=TOLERANCE)
    assert found.second == found.antisymmetric
    assert found.symmetric[1] == pytest.approx(0, abs=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_krein_rutman(shape):
    """The leading factors are semi-definite, with traces between 1 and the root of the size."""
    for seed in range(5):
        best = optimal_kronecker(gradients(*shape, seed))
        for factor, size in zip((best.left, best.right), shape[1:], strict=True):
            assert float(torch.linalg.eigvalsh(factor).min()) > -TOLERANCE
            assert 1 - TOLERANCE <= float(factor.trace()) <= size**0.5 + TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_power_steps_never_lose_cosine(shape):
    """Ĥᵀ Ĥ multiplies the weight on u_1 most: the angle to each leading factor only shrinks, and so
    does the least-squares distance of the alternating scheme; 1e-12: rounding at the end."""
    for seed in range(3):
        values = gradients(*shape, seed)
        best = optimal_kronecker(values, tol=1e-13)
        angles = []
        for steps in range(12):
            left, right = power_steps(values, steps)
            angles.append((float((left * best.left).sum()), float((right * best.right).sum())))
        for before, after in itertools.pairwise(angles):
            # the two sides swap in every step: the left one comes from the right one before
            assert after[0] ** -2 - 1 <= before[1] ** -2 - 1 + 1e-12
            assert after[1] ** -2 - 1 <= before[0] ** -2 - 1 + 1e-12
        sigmas = [optimal_kronecker(values, max_steps=k, tol=0).sigma for k in range(1, 12)]
        assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(sigmas))


def test_one_power_step_is_shampoos_statistics():
    """Proposition 1, with the op that the optimizer uses."""
    values = gradients(40, 4, 5)
    left, right = kronecker_power_step(
        values, torch.eye(4, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    )
    ours = power_steps(values, 1)
    for made, expected in zip(ours, (left, right), strict=True):
        torch.testing.assert_close(made, expected / expected.norm())
    torch.testing.assert_close(left, (values @ values.mT).mean(0) / 5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_bound_is_a_bound(shape, steps):
    for seed in range(5):
        values = gradients(*shape, seed)
        best, found = optimal_kronecker(values, tol=1e-12), singular_values(values)
        norm = float(second_moment(values).norm())
        traces = float(best.left.trace()), float(best.right.trace())
        measured = cosine(values, *power_steps(values, steps))
        bounds = [
            cosine_bound(found.first, sigma2, norm, shape[1:], steps=steps, traces=t)
            for sigma2 in (found.symmetric[1], found.second)
            for t in (traces, (1.0, 1.0))
        ]
        assert all(0 <= bound <= measured + TOLERANCE for bound in bounds)
        assert bounds[0] == max(bounds)
        assert bounds[3] == min(bounds)


def test_the_bound_is_sharp_where_h_is_a_product_and_where_traces_are_largest():
    _, A, B = exactly_kronecker(4, 5)
    norm = float(A.norm() * B.norm())
    assert cosine_bound(norm, 0.0, norm, (4, 5)) == pytest.approx(1)
    assert cosine_bound(0.8, 0.3, 1.0, (4, 5), traces=(2.0, 5**0.5)) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        cosine_bound(1.0, 0.5, 1.0, (4, 5), steps=0)
