"""Test matrices: the families on which inverse roots go wrong, one stack (families, n, n)."""

import math

import torch
from torch import Tensor


def spectrum(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """Q diag(eigenvalues) Qᵀ in float64 with a random orthogonal Q."""
    n = eigenvalues.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    A = (Q * eigenvalues.double()) @ Q.mT
    return (A + A.mT) / 2


def condition(n: int, kappa: float) -> Tensor:
    """Eigenvalues log-spaced from 1 down to 1/kappa."""
    return spectrum(torch.logspace(0, -math.log10(kappa), n, dtype=torch.float64), n)


def low_rank(n: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(n + rank)
    G = torch.randn(n, min(rank, n), dtype=torch.float64, generator=generator)
    return G @ G.mT / rank


def tridiagonal(n: int, alpha: float, beta: float) -> Tensor:
    """alpha on the diagonal, beta beside it; with beta added at both ends it is singular at
    2*beta = alpha (the family of Distributed Shampoo's own tests)."""
    A = torch.diag(torch.full((n,), alpha, dtype=torch.float64))
    side = torch.full((max(n - 1, 0),), beta, dtype=torch.float64)
    A += torch.diag(side, 1) + torch.diag(side, -1) if n > 1 else 0
    A[0, 0] += beta
    A[-1, -1] += beta if n > 1 else 0
    return A


def hilbert(n: int) -> Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return 1 / (i[:, None] + i[None, :] - 1)


def families(n: int) -> dict[str, Tensor]:
    """Positive semi-definite (n, n) float64 matrices by name."""
    flat = torch.ones(n, dtype=torch.float64)
    spiked = torch.where(torch.arange(n) == 0, 1.0, 1e-5).double()
    made = {f"condition 1e{k}": condition(n, 10.0**k) for k in (0, 1, 2, 4, 6, 8, 12)}
    made |= {
        "identity": torch.eye(n, dtype=torch.float64),
        "nearly flat": spectrum(flat + 1e-3 * torch.linspace(-1, 1, n, dtype=torch.float64)),
        "spiked": spectrum(spiked),
        "rank 1": low_rank(n, 1),
        "rank 16": low_rank(n, 16),
        "hilbert": hilbert(n),
        "singular tridiagonal": tridiagonal(n, 1.0, -0.5),
        "tridiagonal": tridiagonal(n, 0.1, 0.05),
        "tiny": 1e-30 * condition(n, 1e3),
        "huge": 1e30 * condition(n, 1e3),
    }
    zero_row = condition(n, 1e2)
    zero_row[n // 2] = 0
    zero_row[:, n // 2] = 0
    if n > 1:
        made["zero row"] = zero_row
    return made
