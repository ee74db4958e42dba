"""Adam on stacks of blocks, each block with its own count of steps: both AdamW and the graft."""

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


def update_(
    exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, moves: Tensor, betas: tuple[float, float]
) -> None:
    """m <- m + (1 - beta1)(G - m), v <- v + (1 - beta2)(G² - v), where moves is 1; all (B, m, n).

    Where moves (B,) is 0 the block keeps its moments bit for bit; `grad` must be finite there too.
    """
    exp_avg.lerp_(grad, per_block(moves * (1 - betas[0])))
    exp_avg_sq.lerp_(grad.square(), per_block(moves * (1 - betas[1])))


def bias(steps: Tensor, beta: float) -> Tensor:
    """1 - beta^steps (B,) without cancellation; a block before its first step counts as after."""
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return -torch.expm1(steps.clamp(min=1) * log_beta)


def direction(
    momentum: Tensor, exp_avg_sq: Tensor, steps: Tensor, beta2: float, eps: float
) -> tuple[Tensor, Tensor]:
    """T (B, m, n) and s (B,) with s*T = m / (sqrt(v / bias2) + eps), m the momentum as given."""
    root_bias = bias(steps, beta2).sqrt()
    denominator = exp_avg_sq.sqrt().add_(per_block(eps * root_bias))
    return torch.div(momentum, denominator, out=denominator), root_bias


def look_ahead(exp_avg: Tensor, grad: Tensor, moves: Tensor, beta1: float) -> Tensor:
    """Nesterov's momentum: what the average would be if this gradient came once more."""
    return exp_avg.lerp(grad, per_block(moves * (1 - beta1)))
