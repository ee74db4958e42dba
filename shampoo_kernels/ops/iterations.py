"""Inverse p-th roots by matrix products alone: the M-form and the product form.

Both run a fixed schedule of polynomials h on stacks (B, n, n) with spectrum in [floor, 1], in the
scalar view s <- s*h(s^p) towards s = 1 with s = lambda^(1/p) x. Both return (X, residual (B,)), X
before the scaling is undone. The residual is that of the last matrix that the schedule computes
anyway, the input of its last step.

Sources: Iannazzo 2006, Guo and Higham 2006 (M-form); Denman and Beavers 1976, Higham 2008 ch. 6
(product form); the minimax steps: schedules.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_kernels.ops.common import mirror_lower
from shampoo_kernels.schedules import in_squares

Coefficients = Sequence[tuple[float, ...]]
PRODUCT_ROOTS = (1, 2, 4)


def newton(A: Tensor, p: int, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
    """M-form: X <- X h(M), M <- h(M)^p M from X = I, M = A.

    All factors are polynomials of one matrix, so every product is symmetric and may be computed by
    half and mirrored, in fp32-grade arithmetic only.
    """
    M = A
    X = h = _polynomial(M, coefficients[0])
    for coefficient in coefficients[1:]:
        M = _times_power(M, h, p)
        h = _polynomial(M, coefficient)
        X = _symmetric(X, h)
    return X, _distance_to_identity(M)


def product(A: Tensor, p: int, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
    """Product form, p in {1, 2, 4}: P -> I is recomputed in every step, which corrects rounding.

    p = 2: P = X Y;       X <- h(P) X, Y <- Y h(P)     from Y = A, X = I (Y -> A^(1/2))
    p = 4: P = X (X Y);   X <- h(P) X, Y <- Y h(P)^2   from Y = A, X = I (Y -> A^(1/2))
    p = 1: the square of p = 2 and of its schedule; P = X A would lose I to rounding, since X
           grows to 1/floor in it.

    Nothing is symmetrised before the end: mirrored updates diverge, even in float32.
    """
    if p == 1:
        X, distance = product(A, 2, coefficients)
        return _symmetric(X, X), distance
    Y = P = A
    a, *rest = coefficients[0]
    W = _polynomial(P, (0.0, *rest))
    X = _add_identity(W.clone(), a)
    for coefficient in coefficients[1:]:
        Y = a * Y + Y @ W if p == 2 else a * a * Y + Y @ (2 * a * W + W @ W)
        P = X @ Y if p == 2 else X @ (X @ Y)
        a, *rest = coefficient
        W = _polynomial(P, (0.0, *rest))
        X = a * X + W @ X
    return (X + X.mT) / 2, _distance_to_identity(P)


def _polynomial(M: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """h(M) of any degree, by `in_squares`."""
    a, b, *rest = in_squares(coefficients)
    h = b * M
    if rest:
        c, *inner = rest
        Q = _polynomial(M, (inner[1], inner[0], 1.0)) if inner else M
        h += c * (Q @ Q)
    return _add_identity(h, a)


def _add_identity(A: Tensor, a: float) -> Tensor:
    A.diagonal(dim1=-2, dim2=-1).add_(a)
    return A


def _symmetric(A: Tensor, B: Tensor) -> Tensor:
    return mirror_lower(A @ B)


def _times_power(M: Tensor, h: Tensor, p: int) -> Tensor:
    """M h^p by right-to-left powers: h is squared, and multiplied to M where p has a bit."""
    while True:
        if p & 1:
            M = _symmetric(M, h)
        p >>= 1
        if not p:
            return M
        h = _symmetric(h, h)


def _distance_to_identity(M: Tensor) -> Tensor:
    """max |M - I| of every block, inf where M is not finite."""
    if M.numel() == 0:
        return M.new_zeros(M.shape[0])
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    return (M - eye).abs().amax((-2, -1)).nan_to_num(nan=torch.inf)
