"""One optimizer step on one stack: statistics and moments, then roots, then the weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_kernels.optim import eigenbasis, factors, graft, moments, statistics, turns
from shampoo_kernels.optim.moments import bias, block_norms, per_block
from shampoo_kernels.optim.stacks import Stack


@dataclass
class Inputs:
    """What the parameters of one group bring to a step; every tensor is a matrix (M, N)."""

    weights: list[Tensor]
    grads: dict[int, Tensor]  # of the parameters that have one; the others are left alone
    exp_avgs: list[Tensor]
    exp_avg_sqs: dict[int, Tensor]  # of the parameters that have one
    steps: list[int]  # gradients seen, this one included


def step_(stack: Stack, inputs: Inputs, group: dict, position: int) -> None:
    """Step the blocks whose parameter has a gradient.

    `position` is what turns go by: see `turns.due`. Blocks with a non-finite gradient keep weights,
    moments, statistics and roots bit for bit. The number of operations depends on the number of
    parts alone.
    """
    for start, part in stack.parts(inputs.grads):
        grad, moves = _look(*_gradient(part, inputs, group))
        part.steps.add_(moves)
        statistics.update_(part, grad, moves, group)
        grad = grad.to(part.dtype)
        exp_avg = part.pack(inputs.exp_avgs)
        moments.average_(exp_avg, grad, moves, group["betas"][0])
        part.unpack_(inputs.exp_avgs, exp_avg)
        turn = turns.due(part, inputs.steps, group, position + start)
        exp_avg_sq = _refresh_(part, grad, moves, turn, inputs, group)
        update, scale = _update(part, grad, moves, (exp_avg, exp_avg_sq), inputs.steps, group)
        if part.key.sides and group["max_update_rms"] is not None:
            scale = _clipped(update, scale, group["max_update_rms"])
        _apply_(part, inputs.weights, update, scale, moves, group)


def follow_(stack: Stack, inputs: Inputs, group: dict) -> None:
    """Bring the moments of blocks along that another rank steps, from the same gradient."""
    beta1, beta2 = group["betas"]
    for _, part in stack.parts(inputs.grads):
        grad, moves = _look(*_gradient(part, inputs, group))
        grad = grad.to(part.dtype)
        exp_avg = part.pack(inputs.exp_avgs)
        moments.average_(exp_avg, grad, moves, beta1)
        part.unpack_(inputs.exp_avgs, exp_avg)
        if part.parameters[0] in inputs.exp_avg_sqs:
            exp_avg_sq = part.pack(inputs.exp_avg_sqs)
            graft.update_second_moment_(exp_avg_sq, grad, moves, beta2, group["graft"])
            part.unpack_(inputs.exp_avg_sqs, exp_avg_sq)


def _refresh_(
    part: Stack,
    grad: Tensor,
    moves: Tensor,
    turn: tuple[Sequence[int], set[int]],
    inputs: Inputs,
    group: dict,
) -> Tensor | None:
    """Refresh roots or bases; gives the second moments (b, m, n) if there are any, updated."""
    (due, first), beta2 = turn, group["betas"][1]
    if part.key.sides and group["application"] == "soap":
        exp_avg_sq = part.extra["exp_avg_sq"]
        rotated = eigenbasis.rotate(part, grad, group["precision"])
        graft.update_second_moment_(exp_avg_sq, rotated, moves, beta2, group["graft"])
        if due:
            eigenbasis.refresh_(part, due, first, moves, group)
        return exp_avg_sq
    if due:
        factors.refresh_roots_(part, due, moves, group)
    if part.parameters[0] not in inputs.exp_avg_sqs:
        return None
    exp_avg_sq = part.pack(inputs.exp_avg_sqs)
    graft.update_second_moment_(exp_avg_sq, grad, moves, beta2, group["graft"])
    part.unpack_(inputs.exp_avg_sqs, exp_avg_sq)
    return exp_avg_sq


def _gradient(part: Stack, inputs: Inputs, group: dict) -> tuple[Tensor, bool]:
    """(b, m, n), and whether it still is to be negated. Coupled decay: G + weight_decay * W."""
    grad = part.pack(inputs.grads)
    if not group["weight_decay"] or group["decoupled_weight_decay"]:
        return grad, group["maximize"]
    sign = -1 if group["maximize"] else 1
    weights = part.pack(inputs.weights).to(part.dtype)
    return sign * grad.to(part.dtype) + group["weight_decay"] * weights, False


def _look(grad: Tensor, negate: bool) -> tuple[Tensor, Tensor]:
    """The gradient (b, m, n) to minimise by, and moves (b,): 1, or 0 in blocks that are not finite.

    Those become zero, because 0 * NaN is not 0. Squares enter the moments, so that they count too.
    """
    norms = block_norms(grad)
    finite = norms.square() < math.inf
    grad = torch.where(per_block(finite), grad, 0)
    return grad.neg_() if negate else grad, finite.to(norms.dtype)


def _update(
    part: Stack, grad: Tensor, moves: Tensor, averages: tuple[Tensor, Tensor | None],
    steps: list[int], group: dict,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """U (b, m, n) and scale (b,): scale * U is what the learning rate multiplies."""
    beta1, beta2 = group["betas"]
    momentum, exp_avg_sq = averages
    correction = bias(part.steps, beta1)
    if group["nesterov"]:
        momentum = moments.look_ahead(momentum, grad, moves, beta1)
        correction = bias(part.steps + 1, beta1)
    started = {i for i in part.parameters if steps[i] >= group["start_step"]}
    preconditions = bool(part.key.sides and started)
    if preconditions and group["application"] == "soap":
        update, scale = eigenbasis.direction(part, momentum, group)
        return update, scale / correction
    if preconditions and group["graft"] is None:
        update, _ = factors.apply_roots(part, momentum, group["precision"])
        return update, 1 / correction
    own, scale = graft.direction(
        momentum, exp_avg_sq, part.steps, beta2, group["eps"], group["graft"]
    )
    scale = scale / correction
    if not preconditions:
        return own, scale
    update, norm = factors.apply_roots(part, momentum, group["precision"])
    ready = norm > 0  # without a root it is 0
    if len(started) < len(part.parameters):
        flags = torch.tensor([block.parameter in started for block in part.blocks])
        ready &= flags.to(part.device, non_blocking=True)
    return (
        torch.where(per_block(ready), update, own),
        torch.where(ready, scale * block_norms(own) / norm, scale),
    )


def _clipped(update: Tensor, scale: Tensor, limit: float) -> Tensor:
    """The scale (b,) with which the root mean square of each block is at most `limit`.

    Source: update clipping of Adafactor (arXiv 1804.04235), U / max(1, RMS(U) / d).
    """
    rms = scale * block_norms(update) / math.sqrt(update[0].numel())
    return scale / (rms / limit).clamp(min=1)


def _apply_(
    part: Stack, weights: list[Tensor], update: Tensor, scale: Tensor, moves: Tensor, group: dict
) -> None:
    """W <- (1 - lr * weight_decay) W - lr * scale * U, for the blocks that move."""
    lr = group["lr"]
    rate = (lr.reshape(()) if isinstance(lr, Tensor) else lr) * moves
    packed = part.pack(weights).to(part.dtype)
    if group["weight_decay"] and group["decoupled_weight_decay"]:
        packed.mul_(per_block(1 - rate * group["weight_decay"]))
    packed.addcmul_(update, per_block(-rate * scale))
    part.unpack_(weights, packed)
