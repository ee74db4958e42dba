"""How close H = E[ggᵀ] of one layer is to a Kronecker product, without ever forming H.

H is (mn, mn); everything here works on the gradients G (N, m, n) that it comes from, through
    <H, R⊗L> = E tr(Gᵀ L G Rᵀ),    ‖R⊗L‖ = ‖R‖ ‖L‖,    ‖H‖² = E_{b,b'} <G_b, G_b'>²,
with g = vec(G) column by column, Frobenius norms, and E the mean over the N gradients given (all
pairs b, b' count, b = b' included: that is the second moment of exactly these gradients).

Source: Morwani et al. 2024 (arXiv 2406.17748); Van Loan and Pitsianis 1993.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_kernels.ops import common
from shampoo_kernels.ops.kronecker_power_step import kronecker_power_step

_CHUNK = 1 << 22  # float64 elements of one temporary: 32 MiB


class OptimalKronecker(NamedTuple):
    """H ≈ sigma * (right ⊗ left), the nearest Kronecker product in Frobenius norm."""

    left: Tensor  # (m, m) float64, unit norm, positive semi-definite
    right: Tensor  # (n, n), likewise
    sigma: float  # the largest singular value of the rearranged H
    steps: int
    converged: bool  # both factors moved by at most tol in the last step


class Cosines(NamedTuple):
    """Cosine between H and three Kronecker products; 1 is a perfect match up to scale."""

    optimal: float
    shampoo_squared: float  # L ⊗ R
    shampoo: float  # L^1/2 ⊗ R^1/2


def cosine(grads: Tensor, left: Tensor, right: Tensor) -> float:
    """Cosine between H = E[ggᵀ] and right ⊗ left, in float64.

    Args:
        grads: (N, m, n), any float dtype: N gradients of one layer, per example or per step.
        left: (m, m); right: (n, n); any float dtype. Their scale does not matter.

    Raises:
        TypeError, ValueError: another shape or dtype, nothing but zeros, or NaN or infinity.
    """
    _check_grads("cosine", grads)
    _check_factor("cosine", "left", left, grads.shape[1])
    _check_factor("cosine", "right", right, grads.shape[2])
    grads, _ = _prepare(grads)
    return _inner(grads, _unit(left.double()), _unit(right.double())) / _norm(grads)


def optimal_kronecker(
    grads: Tensor, *, tol: float = 1e-10, max_steps: int = 1000
) -> OptimalKronecker:
    """The Kronecker product nearest to H = E[ggᵀ], by alternating power steps from the identity.

    Each half step is the least-squares optimal factor given the other one, so sigma never falls;
    the factors converge at the rate (sigma_2 / sigma_1)². Memory: a float64 copy of `grads`
    and the temporaries of one power step, a few times as much.

    Args:
        grads: (N, m, n), any float dtype.
        tol: stop when neither unit-norm factor moved by more than this in one step.
        max_steps: stop there in any case; `converged` says which of the two it was.

    Raises:
        TypeError, ValueError: as `cosine`; tol below 0; max_steps below 1.
    """
    _check_grads("optimal_kronecker", grads)
    if not tol >= 0:
        raise ValueError(f"optimal_kronecker: tol must be at least 0, got {tol}")
    if max_steps < 1:
        raise ValueError(f"optimal_kronecker: max_steps must be at least 1, got {max_steps}")
    grads, scale = _prepare(grads)
    best = _optimal(grads, tol, max_steps)
    return best._replace(sigma=best.sigma * scale**2)


def cosines(grads: Tensor, *, tol: float = 1e-6, max_steps: int = 1000) -> Cosines:
    """Cosine of H = E[ggᵀ] with the optimal Kronecker product, Shampoo² and Shampoo, in float64.

    L = E[GGᵀ] and R = E[GᵀG]: Shampoo² is L ⊗ R, one power step from the identity; Shampoo is
    L^1/2 ⊗ R^1/2.

    Args:
        grads: (N, m, n), any float dtype.
        tol, max_steps: as in `optimal_kronecker`; the error of the optimal cosine is of order tol².

    Raises:
        TypeError, ValueError: as `cosine`.
    """
    _check_grads("cosines", grads)
    grads, _ = _prepare(grads)
    norm = _norm(grads)
    best = _optimal(grads, tol, max_steps)
    left, right = (_unit(factor) for factor in kronecker_power_step(grads, *_identities(grads)))
    roots = _unit(_square_root(left)), _unit(_square_root(right))
    return Cosines(
        optimal=best.sigma / norm,
        shampoo_squared=_inner(grads, left, right) / norm,
        shampoo=_inner(grads, *roots) / norm,
    )


def _optimal(grads: Tensor, tol: float, max_steps: int) -> OptimalKronecker:
    left, right = (_unit(factor) for factor in _identities(grads))
    for step in range(1, max_steps + 1):
        new_left, new_right = kronecker_power_step(grads, left, right, scheme="alternating")
        sigma = float(new_left.norm() * new_right.norm())
        new_left, new_right = _unit(new_left), _unit(new_right)
        moved = max(float((new_left - left).norm()), float((new_right - right).norm()))
        left, right = new_left, new_right
        if moved <= tol:
            return OptimalKronecker(left, right, sigma, step, True)
    return OptimalKronecker(left, right, sigma, max_steps, False)


def _identities(grads: Tensor) -> tuple[Tensor, Tensor]:
    m, n = (torch.eye(k, dtype=grads.dtype, device=grads.device) for k in grads.shape[1:])
    return m, n


def _norm(grads: Tensor) -> float:
    """‖H‖ from the Gram matrix of the N gradients, a few of its rows at a time."""
    flat = grads.reshape(grads.shape[0], -1)
    count = flat.shape[0]
    rows = max(1, _CHUNK // count)
    total = 0.0
    for start in range(0, count, rows):
        gram = flat[start : start + rows] @ flat[start:].T
        width = gram.shape[0]
        total += float(gram[:, :width].square().sum() + 2 * gram[:, width:].square().sum())
    return total**0.5 / count


def _inner(grads: Tensor, left: Tensor, right: Tensor) -> float:
    """<H, right ⊗ left> = E tr(Gᵀ L G Rᵀ)."""
    rows = max(1, _CHUNK // grads[0].numel())
    total = sum(float((chunk * (left @ chunk @ right.mT)).sum()) for chunk in grads.split(rows))
    return total / grads.shape[0]


def _square_root(A: Tensor) -> Tensor:
    """A^1/2 of a positive semi-definite matrix; rounding may have made eigenvalues negative."""
    values, vectors = torch.linalg.eigh(A)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def _unit(A: Tensor) -> Tensor:
    A = A / A.abs().max()  # so that the squares in the norm cannot under- or overflow
    return A / A.norm()


def _prepare(grads: Tensor) -> tuple[Tensor, float]:
    """Gradients in float64 with largest entry 1 (their fourth powers cannot under- or overflow)."""
    scale = float(grads.abs().max())
    return grads.double() / scale, scale


def _check_grads(op: str, grads: Tensor) -> None:
    common.check_tensors(op, grads=grads)
    common.check_dtype(op, "grads", grads, common.FLOATS)
    if grads.ndim != 3 or grads.numel() == 0:
        raise ValueError(f"{op}: grads must be (N, m, n), none of them 0, got {tuple(grads.shape)}")
    _check_numbers(op, "grads", grads)


def _check_factor(op: str, name: str, factor: Tensor, size: int) -> None:
    common.check_tensors(op, **{name: factor})
    common.check_dtype(op, name, factor, common.FLOATS)
    common.check_shape(op, name, factor, (size, size))
    _check_numbers(op, name, factor)


def _check_numbers(op: str, name: str, tensor: Tensor) -> None:
    largest = float(tensor.abs().max())  # NaN where there is one
    if not largest < float("inf"):
        raise ValueError(f"{op}: {name} must be finite, got NaN or infinity")
    if largest == 0:
        raise ValueError(f"{op}: {name} is zero everywhere: there is no cosine with a zero matrix")
