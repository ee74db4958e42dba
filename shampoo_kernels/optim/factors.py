"""Shampoo's two factors on stacks of blocks: statistics, roots with trace scaling, application."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shampoo_kernels.chooser import choose
from shampoo_kernels.ops.gram_ema import gram_ema_
from shampoo_kernels.ops.inverse_root import inverse_root
from shampoo_kernels.ops.precondition import precondition
from shampoo_kernels.optim.blocks import LEFT, RIGHT
from shampoo_kernels.optim.moments import bias, per_block
from shampoo_kernels.optim.stacks import Stack

# Bytes of workspace of one call of inverse_root, its argument and result included.
ROOT_BYTES = 64 << 20


def update_statistics_(
    stack: Stack, grad: Tensor, moves: Tensor, beta: float, precision: str
) -> None:
    """L <- beta L + (1 - beta) G Gᵀ and R likewise, where moves (B,) is 1; unchanged where 0."""
    alpha = moves * (1 - beta)
    for side in stack.key.sides:
        gram_ema_(stack.statistic[side], grad, 1 - alpha, alpha, side=side, precision=precision)


def waiting(stack: Stack) -> list[int]:
    """The blocks that have no root yet, but a statistic to compute it from; synchronises."""
    side = stack.key.sides[0]
    rootless = (stack.root[side][:, 0, 0] == 0).nonzero().flatten()
    if len(rootless):
        rootless = rootless[_trace(stack.statistic[side])[rootless] > 0]
    return rootless.tolist()


def refresh_roots_(stack: Stack, due: Sequence[int], moves: Tensor, group: dict) -> None:
    """Compute the roots of the blocks in `due` anew where moves (B,) is 1.

    The preconditioner is H = L ⊗ R / tr L (arXiv 2406.17748), L and R bias-corrected and
    tr L = tr R. Scaling each factor by tr^(-1/2) before its root makes the scale part of the
    roots: L'^(-1/pl) G R'^(-1/pr) with L' = L / tr^(1/2), R' = R / tr^(1/2), which for pl = pr = p
    is tr^(1/p) L^(-1/p) G R^(-1/p), and in general tr^(1/(2 pl) + 1/(2 pr)). With one factor,
    H = L ⊗ I / n, which has the same trace: the factor is divided by the length n of the other
    side. Either way one step of a single gradient has unit scale, whatever the gradient's.
    """
    for side in stack.key.sides:
        p = group["p"][0 if side == LEFT else 1]
        for part in _root_parts(stack, side, due, group["root_method"]):
            statistic = stack.statistic[side][part]
            scale = _scale(stack, side, statistic, stack.steps[part], group["shampoo_beta"])
            # an all-zero matrix keeps its previous root
            scale = torch.where((moves[part] > 0) & scale.isfinite(), scale, 0)
            result = inverse_root(
                statistic * per_block(scale),
                p,
                ridge=group["ridge"],
                method=group["root_method"],
                precision=group["precision"],
                previous=stack.root[side][part].to(stack.dtype),
            )
            stack.root[side][part] = result.root.to(stack.root[side].dtype)


def _scale(stack: Stack, side: str, statistic: Tensor, steps: Tensor, beta: float) -> Tensor:
    """(b,): what turns the accumulated statistic into the bias-corrected, trace-scaled one."""
    correction = bias(steps, beta)
    if len(stack.key.sides) == 1:
        return 1 / (correction * (stack.key.n if side == LEFT else stack.key.m))
    return (correction * _trace(statistic)).rsqrt()


def _trace(A: Tensor) -> Tensor:
    return A.diagonal(dim1=-2, dim2=-1).sum(-1)


def _root_parts(
    stack: Stack, side: str, due: Sequence[int], method: str
) -> Iterator[slice | Tensor]:
    """`due` in pieces that keep the workspace of inverse_root below ROOT_BYTES, as indices."""
    d = stack.dimension(side)
    count = max(1, ROOT_BYTES // (_matrices(stack, method) * d * d * stack.dtype.itemsize))
    for start in range(0, len(due), count):
        piece = due[start : start + count]
        if isinstance(piece, range):
            yield slice(piece.start, piece.stop, piece.step)
        else:
            yield torch.tensor(piece).to(stack.device, non_blocking=True)


def _matrices(stack: Stack, method: str) -> int:
    """d x d matrices per block that a refresh takes, in the implementation that takes most.

    Native kernels keep their workspace per thread; what remains are the block's copy, its scaled
    copy, its previous root and the result. The torch iterations take 12 in all.
    """
    native = choose("inverse_root", stack.device.type, stack.dtype) == "native"
    kernel = method in ("auto", "eigh") or (method == "newton" and stack.dtype == torch.float32)
    return 4 if native and kernel else 12


def apply_roots(stack: Stack, momentum: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """(preconditioned momentum (B, m, n), its norm (B,)); both 0 where there is no root yet."""
    left, right = (
        stack.root[side].to(stack.dtype) if side in stack.root else None for side in (LEFT, RIGHT)
    )
    result, squared_norm = precondition(momentum, left, right, precision=precision)
    return result, squared_norm.sqrt()
