"""Singular values of the rearranged H, and what they promise for power steps from the identity.

Ĥ (m², n²) is the matrix that takes vec(R) to vec(E[G R Gᵀ]); a Kronecker product R⊗L is the matrix
vec(L) vec(R)ᵀ of rank one there (Van Loan and Pitsianis 1993). It maps symmetric matrices to
symmetric and antisymmetric to antisymmetric ones, so its singular values fall into two groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_kernels.study.gradients import Gradients, as_gradients
from shampoo_kernels.study.kronecker import frobenius

_BREAKDOWN = 1e-13  # of the largest singular value: the Krylov space is exhausted


class SingularValues(NamedTuple):
    """The largest singular values of Ĥ, descending; `antisymmetric`: the largest of that group."""

    symmetric: list[float]
    antisymmetric: float
    converged: bool

    @property
    def first(self) -> float:
        return self.symmetric[0]

    @property
    def second(self) -> float:
        return max(self.symmetric[1], self.antisymmetric)


def singular_values(
    grads: Tensor | Gradients, count: int = 2, *, tol: float = 1e-10, max_steps: int = 200
) -> SingularValues:
    """The `count` largest singular values of the rearranged H on symmetric matrices, and the
    largest one on antisymmetric matrices, by Golub-Kahan-Lanczos, fully reorthogonalised.

    sigma_1 is symmetric (Krein-Rutman: Ĥ maps semi-definite matrices to semi-definite ones), so
    these are the sigma_1 and sigma_2 of H. A value repeated within a group is found once. Memory:
    two matrices, (m, m) and (n, n), a step.

    Args:
        grads: (N, m, n), or what `sample` returns.
        tol: stop when the residual of each wanted value is at most tol * sigma_1.
        max_steps: stop there in any case; `converged` says which of the two it was.

    Raises:
        TypeError, ValueError: as `cosine`; count below 1.
    """
    grads = as_gradients("singular_values", grads)
    if count < 1:
        raise ValueError(f"singular_values: count must be at least 1, got {count}")
    start = torch.randn(
        grads.shape[1], grads.shape[1], generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    ).to(grads.device, grads.dtype)  # fmt: skip
    values, converged = _lanczos(grads, start, 1, count, tol, max_steps, 0.0)
    largest, also = _lanczos(grads, start, -1, 1, tol, max_steps, values[0])
    real = grads.scale**2
    return SingularValues([v * real for v in values], largest[0] * real, converged and also)


def _lanczos(
    grads: Gradients,
    start: Tensor,
    sign: int,
    count: int,
    tol: float,
    max_steps: int,
    largest: float,
) -> tuple[list[float], bool]:
    """(values, converged) on the matrices A = sign * Aᵀ; `largest`: sigma_1 of all, where known.

    Every image is put back onto these matrices: rounding leaves a little of the others in it,
    which Ĥ would multiply, step by step, by a larger singular value than any here.
    """
    if sign < 0 and min(grads.shape) == 1:
        return [0.0] * count, True  # there are no antisymmetric matrices of one row
    lefts: list[Tensor] = []
    rights = [_next(start + sign * start.mT, [])[0]]
    alphas: list[float] = []
    betas: list[float] = []
    values = torch.zeros(count)
    for step in range(1, max_steps + 1):
        image = grads.left(rights[-1])
        u, alpha = _next((image + sign * image.mT) / 2, lefts)
        lefts.append(u)
        alphas.append(alpha)
        image = grads.right(u)
        v, beta = _next((image + sign * image.mT) / 2, rights)
        bidiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        bidiagonal += torch.diag(torch.tensor(betas, dtype=torch.float64), 1)
        P, values, _ = torch.linalg.svd(bidiagonal)
        top = max(float(values[0]), largest)
        residuals = beta * P[-1].abs()
        if min(alpha, beta) <= _BREAKDOWN * top:
            break
        if step >= count and bool((residuals[:count] <= tol * top).all()):
            break
        rights.append(v)
        betas.append(beta)
    else:
        return values[:count].tolist(), False
    return (values.tolist() + [0.0] * count)[:count], True


def _next(image: Tensor, basis: list[Tensor]) -> tuple[Tensor, float]:
    """What is new in `image`, at unit norm, and how much that is; orthogonalised twice."""
    for _ in range(2):
        for other in basis:
            image = image - (image * other).sum() * other
    size = frobenius(image)
    return image / (size or 1.0), size


def cosine_bound(
    sigma1: float,
    sigma2: float,
    norm: float,
    shape: tuple[int, int],
    *,
    traces: tuple[float, float] = (1.0, 1.0),
    steps: int = 1,
) -> float:
    """A lower bound on the cosine between H and R⊗L after `steps` simultaneous power steps from
    the identities: with one step, on the cosine of Shampoo².

    I_n lies at the angle with v_1 whose tangent squared is (n - β²)/β², β the trace of mat(v_1) at
    unit norm, and one application of Ĥ multiplies the tangent by at most sigma_2/sigma_1; the same
    for I_m, m and α on the other side. With c, s the cosines and sines of both factors after the
    steps, <H, R⊗L> >= sigma_1 c_L c_R - sigma_2 s_L s_R at unit norms.

    Args:
        sigma1, sigma2: of Ĥ on symmetric matrices, or of all of it.
        norm: ‖H‖.
        shape: (m, n).
        traces: (α, β), each at least 1 because mat(u_1), mat(v_1) are semi-definite; the default
            is the bound that needs to know nothing but sigma_1, sigma_2 and the shape.
        steps: at least 1.

    Source: Morwani et al. 2024 (arXiv 2406.17748), the argument for one step; for the cosine of
    the product it is combined here.
    """
    if steps < 1:
        raise ValueError(f"cosine_bound: steps must be at least 1, got {steps}")
    (m, n), (alpha, beta) = shape, traces
    shrink = (sigma2 / sigma1) ** (2 * steps)
    from_n, from_m = (
        1 / (1 + shrink * max(size - trace**2, 0.0) / trace**2)
        for size, trace in ((n, beta), (m, alpha))
    )  # the squared cosines of the iterates that began as I_n and as I_m, one on each side
    kept = sigma1 * (from_n * from_m) ** 0.5
    lost = sigma2 * ((1 - from_n) * (1 - from_m)) ** 0.5
    return max(kept - lost, 0.0) / norm
