"""The torch implementations of `inverse_root`, and what they make of blocks that fail.

All write root (B, n, n), residual (B,) and status (B,) for A (B, n, n); `root` may be `previous`.
"""

import torch
from torch import Tensor

from shampoo_kernels.ops import iterations
from shampoo_kernels.ops.common import mirror_lower
from shampoo_kernels.schedules import minimax_coefficients

PRODUCT_ROOTS = iterations.PRODUCT_ROOTS
CONVERGED, KEPT_PREVIOUS, FAILED = 0, 2, 3  # inverse_root.RootStatus
RESIDUAL_LIMIT = 0.05
_CUSHIONS = tuple(i / 50 for i in range(15, 0, -1))


def by_iteration(
    method: str,
    A: Tensor,
    p: int,
    ridge: float,
    floor: float,
    previous: Tensor | None,
    root: Tensor,
    residual: Tensor,
    status: Tensor,
    *,
    backend: str = "reference",
    precision: str = "highest",
) -> None:
    """ "newton" or "product" on (A + ridge*bound*I) / ((1 + ridge)*bound), never synchronising."""
    bound, usable, scale = _bound(A)
    divisor, shift = scale * (1 + ridge), ridge / (1 + ridge)
    steps = schedule(floor, 2 if (method, p) == ("product", 1) else p, A.dtype)
    if backend == "triton":
        from shampoo_kernels.kernels import inverse_root as kernels  # needs triton

        arithmetic = kernels.arithmetic(method, A.shape[-1], p, floor, precision)
        X, distance = kernels.iterate(method, A, divisor, usable, shift, p, steps, arithmetic)
    else:
        scaled = mirror_lower(A) / divisor.view(-1, 1, 1)
        scaled.diagonal(dim1=-2, dim2=-1).add_(shift)
        scaled = _replace(scaled, ~usable)
        iterate = iterations.newton if method == "newton" else iterations.product
        X, distance = iterate(scaled, p, steps)
    X = X * _power(scale * (1 + ridge), -1 / p).view(-1, 1, 1)
    distance = torch.where(usable, distance, torch.inf)
    _finish(X, distance, bound, p, previous, root, residual, status)


def schedule(floor: float, p: int, dtype: torch.dtype) -> tuple[tuple[float, ...], ...]:
    """The minimax steps of degree 1 or 2, whichever takes fewer products in the M-form.

    They run to rounding, so that the residual, that of the last step's input, is far below its
    limit; and they have the largest cushion that costs no further step. float32 M-form, n = 128,
    floor 1e-6, p = 2, condition 10: error 1.7e-6 with the cushion of 0.1, 4.3e-5 without.
    """
    tolerance = 1e-7 if dtype == torch.float32 else 1e-14

    def products(steps: tuple[tuple[float, ...], ...]) -> int:
        degree, power = len(steps[0]) - 1, p.bit_length() + p.bit_count() - 2
        return len(steps) * (degree + 1 + power) - power - 2

    def make(degree: int, cushion: float) -> tuple[tuple[float, ...], ...]:
        return minimax_coefficients(floor, p, degree, tolerance=tolerance, cushion=cushion)

    shortest = min((make(degree, 0.0) for degree in (1, 2)), key=products)
    cushioned = (make(len(shortest[0]) - 1, cushion) for cushion in _CUSHIONS)
    return next((steps for steps in cushioned if len(steps) == len(shortest)), shortest)


def by_eigh(
    A: Tensor,
    p: float,
    ridge: float,
    rank_rtol: float | None,
    previous: Tensor | None,
    root: Tensor,
    residual: Tensor,
    status: Tensor,
) -> None:
    """V diag((lambda + ridge*bound)^(-1/p)) Vᵀ by torch.linalg.eigh; synchronises on a GPU."""
    bound, usable, scale = _bound(A)
    scaled = _replace(mirror_lower(A) / scale.view(-1, 1, 1), ~usable)
    values, vectors, solved = _eigh(scaled)
    unit = torch.finfo(A.dtype).eps / 2
    lowest = values[:, :1] if A.shape[-1] else values.new_zeros(A.shape[0], 1)
    allowed = max(ridge, rank_rtol or 0) + 16 * unit
    usable = usable & solved & (lowest[:, 0] >= -allowed)
    powers = (values + ridge).clamp(min=unit) ** (-0.5 / p)
    if rank_rtol is not None:
        powers = torch.where(values > rank_rtol * values[:, -1:], powers, 0)
    half = vectors * powers.unsqueeze(-2)
    X = mirror_lower(half @ half.mT) * _power(scale, -1 / p).view(-1, 1, 1)
    distance = torch.where(usable, torch.zeros_like(bound), torch.inf)
    _finish(X, distance, bound, p, previous, root, residual, status)


def _eigh(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torch.linalg.eigh, and per block whether it came to an end."""
    solved = torch.ones(A.shape[0], dtype=torch.bool, device=A.device)
    try:
        return *torch.linalg.eigh(A), solved
    except torch.linalg.LinAlgError:
        if A.shape[0] == 1:
            return *torch.linalg.eigh(torch.eye(A.shape[-1]).to(A)[None]), ~solved
        values, vectors, each = zip(*(_eigh(block) for block in A.split(1)), strict=True)
        return torch.cat(values), torch.cat(vectors), torch.cat(each)


def _bound(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bound, whether it is one to scale by, and what to divide by; each (B,)."""
    bound = torch.ops.shampoo_kernels.eigenvalue_bound(A)
    usable = bound.isfinite() & (bound > 0)
    return bound, usable, torch.where(usable, bound, 1)


def _replace(A: Tensor, bad: Tensor) -> Tensor:
    """A with the identity in place of bad blocks, so that they cost and harm nothing."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.where(bad.view(-1, 1, 1), eye, A)


def _power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent, rounded once."""
    return (x.double() ** exponent).to(x.dtype)


def _finish(
    X: Tensor,
    distance: Tensor,
    bound: Tensor,
    p: float,
    previous: Tensor | None,
    root: Tensor,
    residual: Tensor,
    status: Tensor,
) -> None:
    """Write X where it is good, else `previous`, else bound^(-1/p)*I, else I."""
    good = (distance < RESIDUAL_LIMIT) & _finite(X)
    value = _power(bound, -1 / p)
    value = torch.where((bound > 0) & bound.isfinite() & value.isfinite(), value, 1)
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    other, kept = value.view(-1, 1, 1) * eye, torch.zeros_like(good)
    if previous is not None:
        kept = _finite(previous)
        other = torch.where(kept.view(-1, 1, 1), previous, other)
    root.copy_(torch.where(good.view(-1, 1, 1), X, other))
    residual.copy_(torch.where(_finite(X), distance, torch.inf))
    status.copy_(torch.where(good, CONVERGED, torch.where(kept, KEPT_PREVIOUS, FAILED)))


def _finite(A: Tensor) -> Tensor:
    return A.isfinite().flatten(1).all(1)
