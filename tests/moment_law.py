"""The formulas of `ops.moments.Rule` in float64, and how far from them roundings may lead."""

import math
from decimal import Decimal, localcontext
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_kernels.ops.moments import Rule


class Exact(NamedTuple):
    """A number of every entry in float64, and how far from it roundings may lead."""

    value: Tensor
    error: Tensor


def moved(x: Exact, g: Tensor, beta: float, sums: bool, unit: float) -> Exact:
    """x + (1 - beta)(g - x), or x + g: factors, products and sum are rounded."""
    keep, add = (1.0, 1.0) if sums else (beta, 1 - beta)
    size = (keep > 0) * x.value.abs() + add * g.abs()  # nothing is left of x with beta = 0
    return Exact(keep * x.value + add * g, keep * x.error + 6 * unit * size)


def bias(beta: float, steps: int) -> float:
    with localcontext(prec=60):
        return float(1 - Decimal(beta) ** max(steps, 1))


def restated(m, v, g, moves: bool, steps: int, rule: Rule, unit: float):
    """m, v, momentum, own of `Rule`, as Exact."""
    m, v, g = (None if x is None else x.double() for x in (m, v, g))
    beta1, beta2 = rule.betas
    m = Exact(m, torch.zeros_like(m))
    v = None if v is None else Exact(v, torch.zeros_like(v))
    if moves:
        m = moved(m, g, beta1, False, unit)
        if v is not None:
            v = moved(v, g.square(), beta2, rule.graft == "adagrad", unit)
    momentum = moved(m, g, beta1, False, unit) if moves and rule.nesterov else m
    if v is None:
        return m, v, momentum, momentum
    plain = rule.graft in ("rmsprop", "adagrad", "sgd") or beta2 == 1
    eps = rule.eps * (1 if plain else math.sqrt(bias(beta2, steps)))
    root = v.value.sqrt()
    below = root + eps
    # the root of v + e is sqrt(v) + e / (2 sqrt(v)) or less, and sqrt(e) at the most
    slope = torch.minimum(v.error / (2 * root), v.error.sqrt()).nan_to_num(0)
    below_error = slope + 2 * unit * root + 6 * unit * eps + unit * below
    own = momentum.value / below
    error = (momentum.error + own.abs() * below_error) / (below - below_error).clamp(min=0)
    return m, v, momentum, Exact(own, error + unit * own.abs())


def check_near(found: Tensor, exact: Exact, name: str) -> None:
    tiny = 4 * torch.finfo(found.dtype).tiny * torch.finfo(found.dtype).eps  # subnormals
    off = (found.double() - exact.value).abs()
    worst = (off / (exact.error + tiny)).max().item()
    assert worst <= 1, f"{name}: {worst} times what roundings explain"
