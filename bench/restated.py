"""Inverse roots as they were published, restated from the formulas alone, batched, in plain torch.

All take A (B, n, n) float32 or float64 and a shift (B, 1, 1), and return (A + shift I)^(-1/p).
"""

import torch
from torch import Tensor


def eigh_root(A: Tensor, p: float, shift: Tensor) -> Tensor:
    """What a user writes today; it raises for the whole stack on one NaN."""
    values, vectors = torch.linalg.eigh(A)
    return (vectors * (values.unsqueeze(-2) + shift).pow(-1 / p)) @ vectors.mT


def coupled_newton(
    A: Tensor, p: int, shift: Tensor, *, tolerance: float = 1e-6, steps: int = 100
) -> Tensor:
    """Coupled Newton with the stopping rule of Anil et al. 2020 (arXiv 2002.09018).

    M <- T^p M, X <- X T with T = (1 - a) I + a M, a = -1/p, from M = z A, X = z^(1/p) I with
    z = (1 + p) / (2 |A|_F). A block stops at max |M - I| <= tolerance, or keeps its last X when the
    error grows by a fifth. The test waits for the device in every step.
    """
    A, eye = _damped(A, shift)
    z = (1 + p) / (2 * torch.linalg.matrix_norm(A))[:, None, None]
    X, M = z ** (1 / p) * eye, z * A
    error = _distance(M, eye)
    running = error > tolerance
    for _ in range(steps):
        if not running.any():
            break
        T = (1 + 1 / p) * eye - M / p
        M = torch.linalg.matrix_power(T, p) @ M
        new = _distance(M, eye)
        running = running & (new < 1.2 * error)  # NaN stops it too
        X = torch.where(running[:, None, None], X @ T, X)
        running, error = running & (new > tolerance), new
    return X


def okls(A: Tensor, shift: Tensor) -> Tensor:
    """p = 2 in 27 products: the schedule of online KL-Shampoo (OKLS), in the dtype of A.

    Ten minimax steps a + b P of the product form, P = Z Y, Y <- a Y + b Y P, Z <- a Z + b P Z, from
    Y = A / bound, Z = I; the first needs one product, the last two. It is made for float16 products
    on a GPU and scales for them; here it runs in float32.
    """
    A, eye = _damped(A, shift)
    bound = _bound(A)
    Y = A / bound
    steps = minimax_steps(8.5e-4, 10)
    a, b = steps[0]
    Z = a * eye + b * Y
    Y = a * Y + b * (Y @ Y)
    for a, b in steps[1:-1]:
        P = Z @ Y
        Y, Z = a * Y + b * (Y @ P), a * Z + b * (P @ Z)
    a, b = steps[-1]
    Z = a * Z + b * ((Z @ Y) @ Z)
    return (Z + Z.mT) / 2 / bound.sqrt()


def minimax_steps(low: float, count: int) -> list[tuple[float, float]]:
    """(a, b) of s (a + b s²) with the least max |1 - s (a + b s²)| on the interval that the step
    before has left, from [low, 1]: T = high² + high low + low² makes both ends equal, the maximum
    lies at sqrt(T / 3), and the factor centres both on 1. (1.5, -0.5) is the limit."""
    high, steps = 1.0, []
    for _ in range(count):
        T = high * high + high * low + low * low
        top, end = 2 * (T / 3) ** 1.5, low * (T - low * low)
        scale = 2 / (top + end)
        steps.append((scale * T, -scale))
        low, high = scale * end, scale * top
    return steps


def newton_db(A: Tensor, p: int, shift: Tensor, steps: int = 10) -> Tensor:
    """Denman-Beavers in its Newton-Schulz form as DASH has it (arXiv 2602.02016), p = 2 or 4.

    E = 1.5 I - 0.5 Z Y, Y <- Y E, Z <- E Z from Y = A / scale, Z = I; scale is twice the largest
    Rayleigh quotient of ten power steps with 16 vectors. p = 4 is the inverse root of the root.
    """
    A, _ = _damped(A, shift)
    scale = 2 * _rayleigh(A)
    Y, Z = _denman_beavers(A / scale, steps)
    if p == 4:  # Y is the root of A / scale
        scale, Z = scale.sqrt(), _denman_beavers(Y, steps)[1]
    return Z / scale.sqrt()


def _denman_beavers(Y: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    eye = torch.eye(Y.shape[-1], dtype=Y.dtype, device=Y.device)
    Z = E = 1.5 * eye - 0.5 * Y
    Y = Y @ E
    for _ in range(steps - 1):
        E = 1.5 * eye - 0.5 * (Z @ Y)
        Y, Z = Y @ E, E @ Z
    return Y, Z


def _damped(A: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return A + shift * eye, eye


def _distance(M: Tensor, eye: Tensor) -> Tensor:
    return (M - eye).abs().amax((1, 2))


def plain_bound(A: Tensor) -> Tensor:
    """1.01 min(Frobenius, Wolkowicz and Styan, Minc), (B,), by the textbook; not strict."""
    n = A.shape[-1]
    frobenius = A.norm(dim=(1, 2))
    mean = A.diagonal(dim1=1, dim2=2).mean(-1)
    wolkowicz = mean + ((frobenius**2 / n - mean**2).clamp(min=0) * (n - 1)).sqrt()
    rows = A.abs().sum(-1)
    minc = ((A.abs() @ rows[..., None])[..., 0] / rows).amax(-1)
    return 1.01 * torch.stack([frobenius, wolkowicz, minc]).amin(0)


def _bound(A: Tensor) -> Tensor:
    return plain_bound(A)[:, None, None]


def power_iteration(A: Tensor, steps: int, vectors: int = 16) -> Tensor:
    """(B,): the largest Rayleigh quotient of `vectors` normalised random columns."""
    V = torch.randn(*A.shape[:2], vectors, dtype=A.dtype)
    for _ in range(steps):
        V = torch.nn.functional.normalize(A @ V, dim=1)
    return (V * (A @ V)).sum(1).amax(1)


def _rayleigh(A: Tensor) -> Tensor:
    return power_iteration(A, 10)[:, None, None]
