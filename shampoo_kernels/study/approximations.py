"""The approximations of H that are compared: Kronecker products, and products with a corrected
diagonal. Every one is made from sampled gradients alone."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_kernels.study.gradients import Gradients, as_gradients
from shampoo_kernels.study.kronecker import (
    frobenius,
    matrix_power,
    optimal_kronecker,
    power_steps,
    unit,
)

_FLOOR = 1e-6  # of the largest eigenvalue, for inverses: the ridge of `inverse_root`
_STEPS = 200  # towards a fixed point: with singular factors rounding may keep it from settling


class Kronecker(NamedTuple):
    """H ≈ right ⊗ left, up to scale."""

    left: Tensor  # (m, m)
    right: Tensor  # (n, n)
    converged: bool = True  # of what is iterated for

    def inner(self, grads: Gradients) -> float:
        return grads.inner(self.left, self.right)

    @property
    def norm(self) -> float:
        return frobenius(self.left) * frobenius(self.right)

    @property
    def trace(self) -> float:
        return float(self.left.trace() * self.right.trace())


class Corrected(NamedTuple):
    """H ≈ (V⊗U) diag(vec(values)) (V⊗U)ᵀ, U and V orthogonal: the best diagonal in that basis."""

    left: Tensor  # U (m, m)
    right: Tensor  # V (n, n)
    values: Tensor  # (m, n)
    converged: bool = True

    def inner(self, grads: Gradients) -> float:
        return float((self.values * grads.squares(self.left, self.right)).sum())

    @property
    def norm(self) -> float:
        return frobenius(self.values)

    @property
    def trace(self) -> float:
        return float(self.values.sum())


Approximation = Kronecker | Corrected


def fixed_point(
    grads: Tensor | Gradients, q: float, *, tol: float = 1e-8, max_steps: int = 200
) -> tuple[Tensor, Tensor, bool]:
    """(L, R, converged) with L = E[G R^(q-1) Gᵀ] / tr(R^q) and R = E[Gᵀ L^(q-1) G] / tr(L^q).

    The Kronecker product that is nearest to H in a Bregman divergence: q = 2 Frobenius (the optimal
    one here), q = 1 von Neumann (L ⊗ R of Shampoo, one step), q = 1/2 (the whitening of PSGD),
    q = 0 KL (KL-Shampoo). Alternating steps from the identities. Inverse powers take eigenvalues
    below 1e-6 of the largest as that.

    Args:
        grads: (N, m, n), or what `sample` returns.
        q: any number.
        tol: stop when neither factor moved by more than this, relative, in one step.

    Returns: L (m, m) and R (n, n), scaled to equal norms; their product has the scale of H.

    Source: "How Bregman Divergences Shape Shampoo" (2026); KL-Shampoo (arXiv 2509.03378).
    """
    grads = as_gradients("fixed_point", grads)
    if not math.isfinite(q):
        raise ValueError(f"fixed_point: q must be finite, got {q}")
    left, right = (unit(factor) for factor in grads.identities())
    steps, moved = 0, math.inf
    while steps < max_steps and moved > tol:
        steps += 1
        new_left = unit(grads.left(_power(right, q - 1)))
        new_right = unit(grads.right(_power(new_left, q - 1)))
        moved = max(float((new_left - left).norm()), float((new_right - right).norm()))
        left, right = new_left, new_right
        if q == 1:
            moved = 0.0
    # The scale comes last: with singular factors the two equations disagree about it.
    left = grads.left(_power(right, q - 1)) / _power(right, q).trace()
    balance = frobenius(left) ** 0.5
    return left * (grads.scale / balance), right * (grads.scale * balance), moved <= tol


def corrected(grads: Gradients, left: Tensor, right: Tensor) -> Corrected:
    """The best diagonal of H in the eigenbases of left (m, m) and right (n, n)."""
    U, V = (torch.linalg.eigh(factor).eigenvectors for factor in (left, right))
    return Corrected(U, V, grads.squares(U, V))


def _power(A: Tensor, power: float) -> Tensor:
    if power == 0:
        return torch.eye(len(A), dtype=A.dtype, device=A.device)
    return A if power == 1 else matrix_power(A, power, _FLOOR)


def tolerance(grads: Gradients) -> float:
    """Of factors, whose error is squared in a cosine; float32 sums leave noise of 1e-6 to 1e-5."""
    return 1e-6 if grads.dtype == torch.float64 else 1e-4


def _optimal(grads: Gradients) -> Kronecker:
    best = optimal_kronecker(grads, tol=tolerance(grads))
    return Kronecker(best.left, best.right, best.converged)


def _shampoo(grads: Gradients) -> Kronecker:
    left, right = power_steps(grads, 1)
    return Kronecker(matrix_power(left, 0.5), matrix_power(right, 0.5))


def _kfac(grads: Gradients) -> Kronecker:
    if grads.kfac is None:
        raise ValueError(
            f'K-FAC of layer "{grads.layer}" needs the inputs and output gradients of the layer, '
            "which are known for Linear and Conv2d layers (groups=1) alone"
        )
    left, right = (unit(factor.to(grads.dtype)) for factor in grads.kfac)
    return Kronecker(left, right)


def _ekfac(grads: Gradients) -> Corrected:
    kfac = _kfac(grads)
    return corrected(grads, kfac.left, kfac.right)


def _fixed_point(grads: Gradients, q: float) -> Kronecker:
    tol = 1e-4 if grads.dtype == torch.float64 else 1e-3  # of the cosine that is 1e-8 or 1e-6
    left, right, converged = fixed_point(grads, q, tol=tol, max_steps=_STEPS)
    return Kronecker(unit(left), unit(right), converged)


MAKERS: dict[str, Callable[[Gradients], Approximation]] = {
    "optimal": _optimal,
    "shampoo_squared": lambda grads: Kronecker(*power_steps(grads, 1)),
    "shampoo": _shampoo,
    "kfac": _kfac,
    "two_steps": lambda grads: Kronecker(*power_steps(grads, 2)),
    "three_steps": lambda grads: Kronecker(*power_steps(grads, 3)),
    "q_half": lambda grads: _fixed_point(grads, 0.5),
    "kl": lambda grads: _fixed_point(grads, 0.0),
    "corrected": lambda grads: corrected(grads, *power_steps(grads, 1)),
    "ekfac": _ekfac,
}
NAMES = {
    "optimal": "optimal Kronecker",
    "shampoo_squared": "Shampoo²",
    "shampoo": "Shampoo",
    "kfac": "K-FAC",
    "two_steps": "two power steps",
    "three_steps": "three power steps",
    "q_half": "q = 1/2",
    "kl": "KL",
    "corrected": "Shampoo² eigenbasis, best diagonal",
    "ekfac": "EKFAC",
}
ITERATED = ("optimal", "q_half", "kl")


def check_names(op: str, names: Sequence[str]) -> None:
    for name in names:
        if name not in NAMES:
            raise ValueError(f"{op}: names are {', '.join(NAMES)}, got {name!r}")


def approximations(
    grads: Tensor | Gradients, names: Sequence[str] | None = None
) -> dict[str, Approximation]:
    """The named approximations of H = E[ggᵀ], by default all that these gradients allow.

    Args:
        grads: (N, m, n), or what `sample` returns: K-FAC and EKFAC need that, for a Linear or
            Conv2d layer.
        names: keys of `NAMES`.

    Raises:
        TypeError, ValueError: as `cosine`; an unknown name; K-FAC without its factors.
    """
    grads = as_gradients("approximations", grads)
    if names is None:
        names = [n for n in MAKERS if grads.kfac is not None or n not in ("kfac", "ekfac")]
    check_names("approximations", names)
    return {name: MAKERS[name](grads) for name in names}
