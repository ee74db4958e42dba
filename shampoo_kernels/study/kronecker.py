"""How close H = E[ggᵀ] of one layer is to a Kronecker product, without ever forming H.

H is (mn, mn); everything here works on the gradients G (N, m, n) that it comes from, through
    <H, R⊗L> = E tr(Gᵀ L G Rᵀ),    ‖R⊗L‖ = ‖R‖ ‖L‖,    ‖H‖² = E_{b,b'} <G_b, G_b'>²,
with g = vec(G) column by column, Frobenius norms, and E the mean over the N gradients given (all
pairs b, b' count, b = b' included: that is the second moment of exactly these gradients).

`grads` is a tensor (N, m, n), which is measured in float64, or what `sample` returns.

Source: Morwani et al. 2024 (arXiv 2406.17748); Van Loan and Pitsianis 1993.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_kernels.ops import common
from shampoo_kernels.study.gradients import Gradients, as_gradients, check_size


class OptimalKronecker(NamedTuple):
    """H ≈ sigma * (right ⊗ left), the nearest Kronecker product in Frobenius norm."""

    left: Tensor  # (m, m), unit norm, positive semi-definite
    right: Tensor  # (n, n), likewise
    sigma: float  # the largest singular value of the rearranged H
    steps: int
    converged: bool  # both factors moved by at most tol in the last step


class Cosines(NamedTuple):
    """Cosine between H and three Kronecker products; 1 is a perfect match up to scale."""

    optimal: float
    shampoo_squared: float  # L ⊗ R
    shampoo: float  # L^1/2 ⊗ R^1/2


def cosine(grads: Tensor | Gradients, left: Tensor, right: Tensor) -> float:
    """Cosine between H = E[ggᵀ] and right ⊗ left.

    Args:
        grads: (N, m, n), any float dtype: N gradients of one layer, per example or per step.
        left: (m, m); right: (n, n); any float dtype. Their scale does not matter.

    Raises:
        TypeError, ValueError: another shape or dtype, nothing but zeros, or NaN or infinity.
    """
    grads = as_gradients("cosine", grads)
    _check_factor("cosine", "left", left, grads.shape[0])
    _check_factor("cosine", "right", right, grads.shape[1])
    return grads.inner(unit(left.to(grads.dtype)), unit(right.to(grads.dtype))) / grads.norm


def optimal_kronecker(
    grads: Tensor | Gradients, *, tol: float = 1e-10, max_steps: int = 1000
) -> OptimalKronecker:
    """The Kronecker product nearest to H = E[ggᵀ], by alternating power steps from the identity.

    Each half step is the least-squares optimal factor given the other one, so sigma never falls;
    the factors converge at the rate (sigma_2 / sigma_1)².

    Args:
        grads: (N, m, n), any float dtype.
        tol: stop when neither unit-norm factor moved by more than this in one step.
        max_steps: stop there in any case; `converged` says which of the two it was.

    Raises:
        TypeError, ValueError: as `cosine`; tol below 0; max_steps below 1.
    """
    grads = as_gradients("optimal_kronecker", grads)
    if not tol >= 0:
        raise ValueError(f"optimal_kronecker: tol must be at least 0, got {tol}")
    if max_steps < 1:
        raise ValueError(f"optimal_kronecker: max_steps must be at least 1, got {max_steps}")
    left, right = (unit(factor) for factor in grads.identities())
    steps, moved = 0, float("inf")
    while steps < max_steps and moved > tol:
        steps += 1
        new_left = unit(grads.left(right) if steps > 1 else grads.statistics[0])
        new_right = grads.right(new_left)
        sigma = frobenius(new_right)
        new_right = unit(new_right)
        moved = max(float((new_left - left).norm()), float((new_right - right).norm()))
        left, right = new_left, new_right
    return OptimalKronecker(left, right, sigma * grads.scale**2, steps, moved <= tol)


def power_steps(grads: Tensor | Gradients, steps: int) -> tuple[Tensor, Tensor]:
    """The factors (L, R) after simultaneous power steps from the identities, at unit norm.

    L <- E[G R Gᵀ], R <- E[Gᵀ L G]. One step makes Shampoo's own statistics E[GGᵀ] and E[GᵀG].

    Raises:
        TypeError, ValueError: as `cosine`; steps below 0.
    """
    grads = as_gradients("power_steps", grads)
    if steps < 0:
        raise ValueError(f"power_steps: steps must be at least 0, got {steps}")
    if steps == 0:
        left, right = grads.identities()
    else:
        left, right = grads.statistics
    for _ in range(steps - 1):
        left, right = grads.left(unit(right)), grads.right(unit(left))
    return unit(left), unit(right)


def cosines(grads: Tensor | Gradients, *, tol: float = 1e-6, max_steps: int = 1000) -> Cosines:
    """Cosine of H = E[ggᵀ] with the optimal Kronecker product, Shampoo² and Shampoo.

    L = E[GGᵀ] and R = E[GᵀG]: Shampoo² is L ⊗ R, one power step from the identity; Shampoo is
    L^1/2 ⊗ R^1/2.

    Args:
        grads: (N, m, n), any float dtype.
        tol, max_steps: as in `optimal_kronecker`; the error of the optimal cosine is of order tol².

    Raises:
        TypeError, ValueError: as `cosine`.
    """
    grads = as_gradients("cosines", grads)
    best = optimal_kronecker(grads, tol=tol, max_steps=max_steps)
    left, right = power_steps(grads, 1)
    return Cosines(
        optimal=best.sigma / (grads.scale**2 * grads.norm),
        shampoo_squared=grads.inner(left, right) / grads.norm,
        shampoo=cosine(grads, matrix_power(left, 0.5), matrix_power(right, 0.5)),
    )


def matrix_power(A: Tensor, power: float, floor: float = 0.0) -> Tensor:
    """A^power of a positive semi-definite matrix (n, n), exactly symmetric.

    Eigenvalues below `floor` times the largest, which rounding may have made negative, count as
    that; powers below 0 need a floor above 0.
    """
    values, vectors = torch.linalg.eigh(A)
    values = values.clamp(min=floor * float(values[-1])) ** power
    return common.mirror_lower((vectors * values) @ vectors.mT)


def unit(A: Tensor) -> Tensor:
    """A at Frobenius norm 1."""
    A = A / A.abs().max()  # so that the squares in the norm cannot under- or overflow
    return A / frobenius(A)


def frobenius(A: Tensor) -> float:
    """‖A‖, summed in float64: float32 sums of a million squares are 1e-5 off."""
    return float(torch.linalg.vector_norm(A, dtype=torch.float64))


def _check_factor(op: str, name: str, factor: Tensor, size: int) -> None:
    common.check_tensors(op, **{name: factor})
    common.check_dtype(op, name, factor, common.FLOATS)
    common.check_shape(op, name, factor, (size, size))
    check_size(op, name, float(factor.abs().max()))
