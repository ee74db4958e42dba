"""Norms of the blocks of a stack, and numbers that scale them."""

import torch
from torch import Tensor


def per_block(x: Tensor) -> Tensor:
    """(b,) -> (b, 1, 1), to scale the blocks of a stack."""
    return x.view(-1, 1, 1)


def block_norms(x: Tensor) -> Tensor:
    """Frobenius norms (b,) of (b, m, n), by rows: one long float32 sum would lose digits.

    In float32, in float64 for float64.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1, dtype=dtype), dim=-1)


def matrix_norms(A: Tensor) -> Tensor:
    """Frobenius norms (b,) of (b, d, d), also where the squares leave the range of the dtype."""
    largest = A.abs().amax((-2, -1))
    return largest * block_norms(A / per_block(torch.where(largest > 0, largest, 1)))
