"""Averages on stacks of blocks, each block with its own count of steps."""

import math

import torch
from torch import Tensor


def per_block(x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1), to scale the blocks of a stack."""
    return x.view(-1, 1, 1)


def block_norms(x: Tensor) -> Tensor:
    """Frobenius norms (B,) of (B, m, n), by rows: one long float32 sum would lose digits.

    In float32, in float64 for float64.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1, dtype=dtype), dim=-1)


def matrix_norms(A: Tensor) -> Tensor:
    """Frobenius norms (B,) of (B, d, d), also where the squares leave the range of the dtype."""
    largest = A.abs().amax((-2, -1))
    return largest * block_norms(A / per_block(torch.where(largest > 0, largest, 1)))


def average_(exp_avg: Tensor, grad: Tensor, moves: Tensor, beta: float) -> None:
    """m <- m + (1 - beta)(G - m), both (B, m, n), where moves (B,) is 1.

    Where it is 0 the block keeps its average bit for bit; `grad` must be finite there too.
    """
    exp_avg.lerp_(grad, per_block(moves * (1 - beta)))


def bias(steps: Tensor, beta: float) -> Tensor:
    """1 - beta^steps (B,) without cancellation; a block before its first step counts as after.

    1 for beta = 1, where the average is a sum.
    """
    if beta == 1:
        return torch.ones_like(steps)
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return -torch.expm1(steps.clamp(min=1) * log_beta)


def look_ahead(exp_avg: Tensor, grad: Tensor, moves: Tensor, beta1: float) -> Tensor:
    """Nesterov's momentum: what the average would be if this gradient came once more."""
    return exp_avg.lerp(grad, per_block(moves * (1 - beta1)))
