"""The graft: the method whose step length a preconditioned block takes, and its second moments."""

import torch
from torch import Tensor

from shampoo_kernels.optim.moments import bias, per_block

GRAFTS = ("adam", "rmsprop", "adagrad", "sgd", None)


def update_second_moment_(
    exp_avg_sq: Tensor, grad: Tensor, moves: Tensor, beta2: float, graft: str | None
) -> None:
    """v <- v + (1 - beta2)(G² - v), for "adagrad" v <- v + G², where moves (B,) is 1.

    Both (B, m, n). Where moves is 0 the block keeps v bit for bit; `grad` must be finite there too.
    """
    if graft == "adagrad":
        exp_avg_sq.addcmul_(grad.square(), per_block(moves))
    else:
        exp_avg_sq.lerp_(grad.square(), per_block(moves * (1 - beta2)))


def direction(
    momentum: Tensor, exp_avg_sq: Tensor | None, steps: Tensor, beta2: float, eps: float,
    graft: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """T (B, m, n) and s (B,) whose product is the method's own step, m the momentum as given.

    "adam" and None: m / (sqrt(v / bias2) + eps), "rmsprop" and "adagrad": m / (sqrt(v) + eps),
    "sgd": m. Sources: arXiv 1711.05101 (AdamW); grafting: arXiv 2002.11803, 2002.09018.
    """
    if exp_avg_sq is None:
        return momentum, torch.ones_like(steps)
    root_bias = bias(steps, 1 if graft in ("rmsprop", "adagrad") else beta2).sqrt()
    denominator = exp_avg_sq.sqrt().add_(per_block(eps * root_bias))
    return torch.div(momentum, denominator, out=denominator), root_bias
