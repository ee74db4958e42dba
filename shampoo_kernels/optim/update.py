"""One optimizer step on a batch: statistics and moments, then roots, then the weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_kernels.ops.moments import Averages, Entry, Rule, average_squares_, direction, moments_
from shampoo_kernels.ops.norms import block_norms, per_block
from shampoo_kernels.ops.precondition import apply_factors
from shampoo_kernels.optim import eigenbasis, factors, statistics, turns
from shampoo_kernels.optim.batch import Batch
from shampoo_kernels.optim.stacks import Stack


@dataclass
class Inputs:
    """What the parameters of one group bring to a step, by number; tensors are matrices (M, N)."""

    weights: dict[int, Tensor]
    grads: dict[int, Tensor]  # of the parameters that have one; the others are left alone
    steps: list[int]  # gradients seen, this one included


def step_(batch: Batch, inputs: Inputs, group: dict) -> None:
    """Step the blocks.

    Those with a non-finite gradient keep weights, moments, statistics and roots bit for bit. The
    number of operations depends on the number of parts alone.
    """
    grads, moves = _gradients(batch, inputs, group)
    steps, rule = batch.count_(moves), _rule(batch, group)
    if batch.has_factors:
        statistics.update_(batch, grads, moves, group)
    averages = _average_(batch, grads, moves, steps, rule, _asks(batch, rule))
    if batch.has_factors:
        by_part = zip(batch.parts, grads, batch.split(moves), batch.places(), strict=True)
        for part, grad, move, place in by_part:
            turn = turns.due(part, inputs.steps, group, place)
            _refresh_(part, grad, move, turn, rule, group)
    _apply_(batch, inputs, averages, moves, steps, rule, group)


def follow_(batch: Batch, inputs: Inputs, group: dict) -> None:
    """Bring the moments of blocks along that another rank steps, from the same gradient."""
    grads, moves = _gradients(batch, inputs, group)
    steps = torch.ones_like(moves)  # which only the graft's step depends on
    _average_(batch, grads, moves, steps, _rule(batch, group), wanted=False)


def _rule(batch: Batch, group: dict) -> Rule:
    """The momentum looks ahead in blocks with factors alone: the others run the graft as it is."""
    nesterov = group["nesterov"] and batch.has_factors
    return Rule(group["betas"], group["eps"], group["graft"], nesterov)


def _asks(batch: Batch, rule: Rule) -> bool:
    """Whether the graft's step itself is wanted: for blocks without factors, and for those that
    have no root yet. On a CPU that is seen when it is so."""
    grafted = rule.graft is not None and batch.device.type != "cpu"
    return grafted or not batch.has_factors


def _gradients(batch: Batch, inputs: Inputs, group: dict) -> tuple[list[Tensor], Tensor]:
    """The gradients (b, m, n) to minimise by, and moves (blocks,): see `Batch.gradients`.

    Coupled decay adds weight_decay * W.
    """
    grads, moves = batch.gradients(inputs.grads, group["maximize"])
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        weights = batch.pack(batch.pieces(inputs.weights))
        grads = [G + group["weight_decay"] * W for G, W in zip(grads, weights, strict=True)]
        moves = moves * batch.join([block_norms(G).square() < math.inf for G in grads])
        grads = [
            torch.where(per_block(move) > 0, G, 0)
            for G, move in zip(grads, batch.split(moves), strict=True)
        ]
    return grads, moves


def _average_(
    batch: Batch, grads: list[Tensor], moves: Tensor, steps: Tensor, rule: Rule, wanted: bool
) -> Averages:
    entries = [
        Entry(exp_avgs, exp_avg_sqs, grad.to(batch.dtype), wanted)
        for (exp_avgs, exp_avg_sqs), grad in zip(batch.averages, grads, strict=True)
    ]
    return moments_(entries, moves, steps, rule)


def _refresh_(
    part: Stack, grad: Tensor, moves: Tensor, turn: tuple[Sequence[int], set[int]], rule: Rule,
    group: dict,
) -> None:  # fmt: skip
    """The squares in an eigenbasis, then the roots or bases whose turn it is."""
    due, first = turn
    if group["application"] == "soap":
        rotated = eigenbasis.rotate(part, grad.to(part.dtype), group["precision"])
        average_squares_(part.extra["exp_avg_sq"], rotated, moves, rule)
        if due:
            eigenbasis.refresh_(part, due, first, moves, group)
    elif due:
        factors.refresh_roots_(part, due, moves, group)


def _apply_(
    batch: Batch, inputs: Inputs, averages: Averages, moves: Tensor, steps: Tensor, rule: Rule,
    group: dict,
) -> None:  # fmt: skip
    """W <- (1 - lr * weight_decay) W - lr * scale * U, for the blocks that move."""
    if not batch.has_factors:
        updates, scale = averages.own, rule.root_bias(steps)
    elif group["application"] == "soap":
        updates, scale = _in_eigenbasis(batch, inputs, averages, rule, group), rule.root_bias(steps)
    else:
        updates, scale = _by_roots(batch, inputs, averages, steps, rule, group)
    scale = scale / rule.momentum_bias(steps)
    if batch.has_factors and group["max_update_rms"] is not None:
        scale = _clipped(batch, updates, scale, group["max_update_rms"])
    lr = group["lr"]
    step = moves * -(lr.reshape(()) if isinstance(lr, Tensor) else lr)
    decay = group["weight_decay"] if group["decoupled_weight_decay"] else 0
    batch.apply_(inputs.weights, 1 + step * decay, step * scale, updates)


def _started(part: Stack, inputs: Inputs, group: dict) -> bool:
    """Whether any of these blocks is past start_step."""
    return max(inputs.steps[i] for i in part.parameters) >= group["start_step"]


def _in_eigenbasis(
    batch: Batch, inputs: Inputs, averages: Averages, rule: Rule, group: dict
) -> list[Tensor]:
    """U (b, m, n) of every part; before start_step the bases, which are I, are left out."""
    return [
        eigenbasis.direction(part, momentum, rule, group["precision"])
        if _started(part, inputs, group)
        else direction(momentum, part.extra["exp_avg_sq"], part.steps, rule)
        for part, momentum in zip(batch.parts, averages.momenta, strict=True)
    ]


def _by_roots(
    batch: Batch, inputs: Inputs, averages: Averages, steps: Tensor, rule: Rule, group: dict
) -> tuple[list[Tensor], Tensor]:
    """U (b, m, n) of every part, and the scale (blocks,).

    With a graft, scale * U has the norm of the graft's own step, and where a block has no root yet
    (U is 0), or its parameter has not started, it is that step.
    """
    precision = group["precision"]
    found = [
        apply_factors(momentum, *part.left_right(), precision=precision)
        if _started(part, inputs, group)
        else (momentum, torch.zeros_like(part.steps))
        for part, momentum in zip(batch.parts, averages.momenta, strict=True)
    ]
    updates = [update for update, _ in found]
    norms = batch.join([squared_norm for _, squared_norm in found]).sqrt()
    if rule.graft is None:
        return updates, torch.ones_like(steps)
    ready, scale = norms > 0, rule.root_bias(steps)
    if min(inputs.steps[i] for i in batch.parameters) < group["start_step"]:
        seen = [inputs.steps[block.parameter] for part in batch.parts for block in part.blocks]
        started = torch.tensor([step >= group["start_step"] for step in seen], device="cpu")
        ready &= started.to(batch.device, non_blocking=True)
    if batch.device.type != "cpu" or not ready.all():  # elsewhere looking would mean waiting
        own = averages.own if _asks(batch, rule) else _directions(batch, averages, rule)
        updates = [
            torch.where(per_block(here), update, step)
            for here, update, step in zip(batch.split(ready), updates, own, strict=True)
        ]
    own_norms = averages.squared_norms.sqrt().to(norms.dtype)
    return updates, torch.where(ready, scale * own_norms / norms, scale)


def _directions(batch: Batch, averages: Averages, rule: Rule) -> list[Tensor]:
    """The graft's steps of all parts."""
    if rule.graft == "sgd":
        return averages.momenta
    squares = batch.pack([piece for _, pieces in batch.averages for piece in pieces or ()])
    return [
        direction(momentum, exp_avg_sq, part.steps, rule)
        for part, momentum, exp_avg_sq in zip(batch.parts, averages.momenta, squares, strict=True)
    ]


def _clipped(batch: Batch, updates: list[Tensor], scale: Tensor, limit: float) -> Tensor:
    """The scale with which the root mean square of each block is at most `limit`.

    Source: update clipping of Adafactor (arXiv 1804.04235), U / max(1, RMS(U) / d).
    """
    rms = batch.join([block_norms(U) / math.sqrt(U.shape[1] * U.shape[2]) for U in updates])
    return scale / (scale * rms / limit).clamp(min=1)
