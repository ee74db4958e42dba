"""Shampoo's two factors on stacks of blocks: statistics, roots with trace scaling, application."""

from collections.abc import Iterator

import torch
from torch import Tensor

from shampoo_kernels.ops.gram_ema import gram_ema_
from shampoo_kernels.ops.inverse_root import inverse_root
from shampoo_kernels.ops.precondition import precondition
from shampoo_kernels.optim.blocks import LEFT, RIGHT
from shampoo_kernels.optim.moments import bias, per_block
from shampoo_kernels.optim.stacks import Stack

# Bytes of workspace of one call of inverse_root, which takes about six matrices per block.
ROOT_BYTES = 64 << 20


def update_statistics_(
    stack: Stack, part: slice, grad: Tensor, moves: Tensor, beta: float, precision: str
) -> None:
    """L <- beta L + (1 - beta) G Gᵀ and R likewise, where moves (B,) is 1; unchanged where 0."""
    alpha = moves * (1 - beta)
    for side in stack.key.sides:
        gram_ema_(
            stack.statistic[side][part], grad, 1 - alpha, alpha, side=side, precision=precision
        )


def refresh_roots_(stack: Stack, chosen: slice, keep: Tensor, group: dict) -> None:
    """Compute the roots of the blocks in `chosen` anew, but not where keep (B,) is true.

    The preconditioner is H = L ⊗ R / tr L (arXiv 2406.17748), L and R bias-corrected and
    tr L = tr R. Scaling each factor by tr^(-1/2) before its root makes the scale part of the
    roots: L'^(-1/pl) G R'^(-1/pr) with L' = L / tr^(1/2), R' = R / tr^(1/2), which for pl = pr = p
    is tr^(1/p) L^(-1/p) G R^(-1/p), and in general tr^(1/(2 pl) + 1/(2 pr)). With one factor,
    H = L ⊗ I / n, which has the same trace: the factor is divided by the length n of the other
    side. Either way one step of a single gradient has unit scale, whatever the gradient's.
    """
    for side in stack.key.sides:
        p = group["p"][0 if side == LEFT else 1]
        for part in _root_parts(stack, side, chosen):
            statistic = stack.statistic[side][part]
            root = stack.root[side][part]
            scale = _scale(stack, side, statistic, part, group["shampoo_beta"])
            # an all-zero matrix keeps its previous root
            scale = torch.where(keep[part] | ~scale.isfinite(), 0, scale)
            result = inverse_root(
                statistic * per_block(scale),
                p,
                ridge=group["ridge"],
                method=group["root_method"],
                precision=group["precision"],
                previous=root.to(stack.dtype),
            )
            root.copy_(result.root)


def _scale(stack: Stack, side: str, statistic: Tensor, part: slice, beta: float) -> Tensor:
    """(b,): what turns the accumulated statistic into the bias-corrected, trace-scaled one."""
    correction = bias(stack.steps[part], beta)
    if len(stack.key.sides) == 1:
        return 1 / (correction * (stack.key.n if side == LEFT else stack.key.m))
    trace = statistic.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (correction * trace).rsqrt()


def _root_parts(stack: Stack, side: str, chosen: slice) -> Iterator[slice]:
    """`chosen` in pieces that keep the workspace of inverse_root below ROOT_BYTES."""
    d = stack.dimension(side)
    count = max(1, ROOT_BYTES // (6 * d * d * stack.dtype.itemsize))
    indices = range(*chosen.indices(len(stack.blocks)))
    for start in range(0, len(indices), count):
        piece = indices[start : start + count]
        yield slice(piece.start, piece.stop, piece.step)


def apply_roots(
    stack: Stack, part: slice, momentum: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """(preconditioned momentum (b, m, n), its norm (b,))."""
    left, right = (
        stack.root[side][part].to(stack.dtype) if side in stack.root else None
        for side in (LEFT, RIGHT)
    )
    result, squared_norm = precondition(momentum, left, right, precision=precision)
    return result, squared_norm.sqrt()
