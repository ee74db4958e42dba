"""Orthogonalisation by matrix products: the polar factor, or the Newton-Schulz of Muon."""

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

from shampoo_kernels import native
from shampoo_kernels.chooser import choose_for
from shampoo_kernels.ops import common
from shampoo_kernels.ops.product import product
from shampoo_kernels.schedules import minimax_coefficients

_OP = "orthogonalize"
_EXPECTED = "coefficients must be (a, b, c) or a sequence of such triples"
_MUON_EPS = 1e-7  # Muon's guard against a zero norm
# Smallest singular value, relative to the bound on the largest, that comes out as 1: a few rounding
# errors. The floor is of its square, which is what the steps see.
_FLOOR = {torch.float32: 1e-13, torch.float64: 1e-24}
_TOLERANCE = {torch.float32: 1e-7, torch.float64: 1e-14}


def orthogonalize(
    G: Tensor,
    *,
    steps: int | None = None,
    coefficients: Sequence | None = None,
    precision: str = "highest",
) -> Tensor:
    """The polar factor U Vᵀ of G = U S Vᵀ, or what the Newton-Schulz steps of Muon make of it.

    Every step is X <- a X + (b S + c S²) X with S = X Xᵀ on the shorter side. By default the
    steps are minimax and bring singular values above 3e-7 (float64: 1e-12) of the largest to 1,
    with errors below 100 + 4κ units of rounding, κ the condition number. Exactly zero rows and
    columns stay zero; values at the level of rounding come out anywhere from 0 to 1. Computed in
    float32 (float64 for float64) and returned in the dtype of G.

    Args:
        G: (*, m, n), any strides; float64, float32, bfloat16 or float16.
        steps: with one triple of coefficients, how often it is applied; 5 by default.
        coefficients: None for the polar factor; one triple (a, b, c), or a sequence of triples, one
            per step, applied as Muon-type optimizers do: from G / max(‖G‖, 1e-7), Frobenius.
        precision: of float32 products on a GPU: "highest", "high" or "medium". A CPU ignores it,
            but for one that multiplies bfloat16 itself: there "medium", with coefficients, rounds
            operands to that, for an error of one or two per cent as in Muon's own steps.

    Returns:
        (*, m, n) in the dtype of G. A zero block gives zeros, a block with NaN or Inf gives NaN; no
        block touches another.

    Raises:
        TypeError: a dtype or type that is not listed; ValueError: any other mismatch, or G requires
        grad.

    Sources: Amsel et al. (arXiv 2505.16932) and Grishina et al. (arXiv 2506.10935) for the minimax
    steps; Jordan et al. 2024 (Muon) for the rest.
    """
    (G,) = common.as_tensors(_OP, G=G)
    straight = common.check_tensors(_OP, G=G)
    if G.ndim < 2:
        raise ValueError(f"{_OP}: G must be (*, m, n), got {tuple(G.shape)}")
    common.check_option(_OP, "precision", precision, common.PRECISIONS)
    flat = _flatten(steps, coefficients)
    op = _implementation if straight else torch.ops.shampoo_kernels.orthogonalize
    return common.unstack(op(common.stack(G), flat, precision=precision), G.shape)


def _flatten(steps: object, coefficients: object) -> list[float] | None:
    """a, b, c of every step in one list, as an operator's argument; None for the default."""
    times = 5 if steps is None else common.check_integer(_OP, "steps", steps, least=1)
    if coefficients is None and steps is None:
        return None
    triples = [] if coefficients is None else _items(coefficients, coefficients)
    single = bool(triples) and all(isinstance(c, Real) for c in triples)
    if steps is not None and not single:
        raise ValueError(f"{_OP}: steps must come with one triple of coefficients, got {steps}")
    triples = [triples] * times if single else [_items(x, coefficients) for x in triples]
    if not triples or any(len(triple) != 3 for triple in triples):
        raise ValueError(f"{_OP}: {_EXPECTED}, got {coefficients!r}")
    flat = [common.check_number(_OP, "coefficients", c, "numbers") for x in triples for c in x]
    if not all(map(math.isfinite, flat)):
        raise ValueError(f"{_OP}: coefficients must be finite, got {coefficients!r}")
    return flat


def _items(given: object, coefficients: object) -> list:
    if isinstance(given, (str, bytes, dict, Tensor)) or not isinstance(given, Iterable):
        raise TypeError(f"{_OP}: {_EXPECTED}, got {coefficients!r}")
    return list(given)


def _orthogonalize(G: Tensor, coefficients: list[float] | None, precision: str) -> Tensor:
    """(B, m, n) -> (B, m, n) in float32 or float64."""
    X = G.to(torch.float64 if G.dtype == torch.float64 else torch.float32).contiguous()
    scale = X.abs().amax((-2, -1), keepdim=True)
    X = X / torch.where(scale > 0, scale, 1.0)
    backend = choose_for(_OP, X)
    if coefficients is None:
        S = _gram(X, backend)
        factor = torch.ops.shampoo_kernels.eigenvalue_bound(S)[:, None, None].rsqrt()
        factor = torch.where(scale > 0, factor, scale)  # NaN stays NaN
        return _steps(X * factor, _polar_steps(X.dtype), backend, S * factor**2)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)  # of G / scale
    X = X / torch.maximum(norm, _MUON_EPS / scale)
    steps = tuple(zip(*[iter(coefficients)] * 3, strict=True))
    if precision == "medium" and backend == "native" and native.multiplies_bfloat16():
        return _narrow_steps(X, steps)
    return _steps(X, steps, backend)


def _steps(
    X: Tensor, steps: Sequence[Sequence[float]], backend: str, S: Tensor | None = None
) -> Tensor:
    """S: the first _gram(X), where it is known already."""
    tall = X.shape[-2] > X.shape[-1]
    for a, b, c in steps:
        S = _gram(X, backend) if S is None else S
        W = product(S, S, S, b=b, c=c, symmetric=True, backend=backend)
        left, right = (X, W) if tall else (W, X)
        X, S = product(left, right, X, b=a, backend=backend), None
    return X


def _gram(X: Tensor, backend: str) -> Tensor:
    """X Xᵀ or Xᵀ X, whichever is smaller."""
    X = X.mT if X.shape[-2] > X.shape[-1] else X
    return product(X, X.mT, symmetric=True, backend=backend)


def _narrow_steps(X: Tensor, steps: Sequence[Sequence[float]]) -> Tensor:
    """With operands in bfloat16, sums in float32, by the native product. S is rounded wherever it
    comes in: only what is a polynomial of one matrix commutes with it."""
    multiply = torch.ops.shampoo_kernels_native.product_
    tall = X.shape[-2] > X.shape[-1]
    S = X.new_empty(X.shape[0], *[min(X.shape[1:])] * 2)
    for a, b, c in steps:
        Y = X.bfloat16()
        wide = Y.mT if tall else Y
        multiply(S, wide, wide.mT, None, 0.0, 0.0, 1.0, True)
        T = S.bfloat16()
        multiply(S.copy_(T), T, T, None, a, b, c, True)  # aI + bT + cT²
        W = S.bfloat16()
        left, right = (Y, W) if tall else (W, Y)
        multiply(X, left, right, None, 0.0, 0.0, 1.0, False)
    return X


def _polar_steps(dtype: torch.dtype) -> tuple[tuple[float, ...], ...]:
    """The cushion spares large singular values, whose directions a plain minimax step spoils by
    throwing them down to the floor; without headroom a value near 2 diverges."""
    return minimax_coefficients(
        _FLOOR[dtype], 2, 2, tolerance=_TOLERANCE[dtype], cushion=0.1, headroom=0.01
    )


def _check(G: Tensor, coefficients: list[float] | None, *, precision: str = "highest") -> None:
    common.check_option(_OP, "precision", precision, common.PRECISIONS)
    common.check_dtype(_OP, "G", G, common.FLOATS)
    if G.ndim != 3:
        raise ValueError(f"{_OP}: G must be (B, m, n), got {tuple(G.shape)}")
    if coefficients is not None and (not coefficients or len(coefficients) % 3):
        raise ValueError(
            f"{_OP}: coefficients must be three numbers per step, got {len(coefficients)}"
        )


def _implementation(G, coefficients=None, *, precision="highest") -> Tensor:
    _check(G, coefficients, precision=precision)
    if G.numel() == 0:
        return G.new_empty(G.shape)
    return _orthogonalize(G, coefficients, precision).to(G.dtype).contiguous()


def _fake(G, coefficients=None, *, precision="highest") -> Tensor:
    _check(G, coefficients, precision=precision)
    return G.new_empty(G.shape)


common.register(
    'orthogonalize(Tensor G, float[]? coefficients=None, *, str precision="highest") -> Tensor',
    _implementation,
    _fake,
)
