"""One optimizer step on a batch: statistics and moments, then roots, then the weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_kernels.ops.moments import Averages, Entry, Rule, average_squares_, direction, moments_
from shampoo_kernels.ops.norms import block_norms, per_block
from shampoo_kernels.optim import eigenbasis, factors, statistics, turns
from shampoo_kernels.optim.batch import Batch
from shampoo_kernels.optim.stacks import Stack


@dataclass
class Inputs:
    """What the parameters of one group bring to a step, by number; tensors are matrices (M, N)."""

    weights: dict[int, Tensor]
    grads: dict[int, Tensor]  # of the parameters that have one; the others are left alone
    exp_avgs: dict[int, Tensor]
    exp_avg_sqs: dict[int, Tensor]  # of the parameters that have one
    steps: list[int]  # gradients seen, this one included


def step_(batch: Batch, inputs: Inputs, group: dict) -> None:
    """Step the blocks.

    Those with a non-finite gradient keep weights, moments, statistics and roots bit for bit. The
    number of operations depends on the number of parts alone.
    """
    grads, moves = _gradients(batch, inputs, group)
    steps = batch.count_(moves)
    by_part = list(zip(batch.parts, grads, batch.split(moves), strict=True))
    for part, grad, move in by_part:
        statistics.update_(part, grad, move, group)
    rule = _rule(group)
    averages = _average_(batch, inputs, grads, moves, steps, rule, group)
    for (part, grad, move), position in zip(by_part, batch.positions, strict=True):
        _refresh_(part, grad, move, turns.due(part, inputs.steps, group, position), rule, group)
    _apply_(batch, inputs, averages, moves, steps, rule, group)


def follow_(batch: Batch, inputs: Inputs, group: dict) -> None:
    """Bring the moments of blocks along that another rank steps, from the same gradient."""
    grads, moves = _gradients(batch, inputs, group)
    _average_(batch, inputs, grads, moves, torch.ones_like(moves), _rule(group), group)


def _rule(group: dict) -> Rule:
    return Rule(group["betas"], group["eps"], group["graft"], group["nesterov"])


def _gradients(batch: Batch, inputs: Inputs, group: dict) -> tuple[list[Tensor], Tensor]:
    """The gradients (b, m, n) to minimise by, and moves (blocks,): see `Batch.gradients`.

    Coupled decay adds weight_decay * W.
    """
    grads, moves = batch.gradients(inputs.grads, group["maximize"])
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        weights = batch.pack(inputs.weights)
        grads = [
            torch.where(per_block(move) > 0, grad + group["weight_decay"] * weight, 0)
            for grad, weight, move in zip(grads, weights, batch.split(moves), strict=True)
        ]
    return grads, moves


def _average_(
    batch: Batch, inputs: Inputs, grads: list[Tensor], moves: Tensor, steps: Tensor, rule: Rule,
    group: dict,
) -> Averages:  # fmt: skip
    entries = []
    for part, grad in zip(batch.parts, grads, strict=True):
        squared = part.parameters[0] in inputs.exp_avg_sqs
        squares = part.pieces(inputs.exp_avg_sqs) if squared else None
        # nobody asks for the graft's step of a block that has its own scale
        wanted = not part.key.sides or group["graft"] is not None
        entries.append(Entry(part.pieces(inputs.exp_avgs), squares, grad.to(part.dtype), wanted))
    return moments_(entries, moves, steps, rule)


def _preconditions(part: Stack, inputs: Inputs, group: dict) -> bool:
    """Whether any of these blocks is past start_step and has factors."""
    started = max(inputs.steps[i] for i in part.parameters) >= group["start_step"]
    return bool(part.key.sides) and started


def _refresh_(
    part: Stack, grad: Tensor, moves: Tensor, turn: tuple[Sequence[int], set[int]], rule: Rule,
    group: dict,
) -> None:  # fmt: skip
    """The squares in an eigenbasis, then the roots or bases whose turn it is."""
    due, first = turn
    if part.key.sides and group["application"] == "soap":
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
    """W <- (1 - lr * weight_decay) W - lr * scale * U, for the blocks that move.

    With a graft, scale * U has the norm of the graft's own step, and where a block has no root yet
    (U is 0), or its parameter has not started, it is that step.
    """
    own_norms = averages.squared_norms.sqrt().to(batch.dtype)
    updates, norms = _updates(batch, inputs, averages, batch.split(own_norms), rule, group)
    scale = _root_bias(batch, steps, rule, group) / rule.momentum_bias(steps)
    if group["graft"] is not None:
        ready, started = norms > 0, _started(batch, inputs, group)
        ready = ready if started is None else ready & started
        updates = _ready(batch, ready, updates, averages.own)
        scale = torch.where(ready, scale * own_norms / norms, scale)
        norms = torch.where(ready, norms, own_norms)
    if group["max_update_rms"] is not None:
        scale = _clipped(batch, scale, norms, group["max_update_rms"])
    lr = group["lr"]
    rate = (lr.reshape(()) if isinstance(lr, Tensor) else lr) * moves
    decay = group["weight_decay"] if group["decoupled_weight_decay"] else 0
    batch.apply_(inputs.weights, 1 - rate * decay, -rate * scale, updates)


def _ready(
    batch: Batch, ready: Tensor, updates: list[Tensor], own: list[Tensor | None]
) -> list[Tensor]:
    """U where ready (blocks,) is true, else the graft's own step."""
    if batch.device.type == "cpu" and ready.all():
        return updates
    return [
        update
        if instead is None or instead is update
        else torch.where(here.view(-1, 1, 1), update, instead)
        for update, instead, here in zip(updates, own, batch.split(ready), strict=True)
    ]


def _updates(
    batch: Batch, inputs: Inputs, averages: Averages, own_norms: list[Tensor], rule: Rule,
    group: dict,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """U (b, m, n) of every part, and the norms (blocks,)."""
    updates: list[Tensor] = []
    norms: list[Tensor] = []
    for part, momentum, own, own_norm in zip(
        batch.parts, averages.momenta, averages.own, own_norms, strict=True
    ):
        preconditions = _preconditions(part, inputs, group)
        if part.key.sides and group["application"] == "soap":
            if preconditions:
                update = eigenbasis.direction(part, momentum, rule, group["precision"])
            else:
                update = direction(momentum, part.extra["exp_avg_sq"], part.steps, rule)
            norm = block_norms(update)
        elif preconditions:
            update, norm = factors.apply_roots(part, momentum, group["precision"])
        else:
            assert own is not None
            update, norm = own, own_norm
        updates.append(update)
        norms.append(norm)
    return updates, batch.join(norms)


def _root_bias(batch: Batch, steps: Tensor, rule: Rule, group: dict) -> Tensor:
    """(blocks,); 1 for what roots are applied to without a graft."""
    found = rule.root_bias(steps)
    if group["graft"] is not None or group["application"] == "soap":
        return found
    by_part = zip(batch.parts, batch.split(found), strict=True)
    return batch.join([torch.ones_like(x) if part.key.sides else x for part, x in by_part])


def _started(batch: Batch, inputs: Inputs, group: dict) -> Tensor | None:
    """(blocks,) bool: whose parameter is past start_step; None where all are."""
    steps = [inputs.steps[block.parameter] for part in batch.parts for block in part.blocks]
    if min(steps) >= group["start_step"]:
        return None
    flags = torch.tensor([step >= group["start_step"] for step in steps])
    return flags.to(batch.device, non_blocking=True)


def _clipped(batch: Batch, scale: Tensor, norms: Tensor, limit: float) -> Tensor:
    """The scale with which the root mean square of each block with a factor is at most `limit`.

    Source: update clipping of Adafactor (arXiv 1804.04235), U / max(1, RMS(U) / d).
    """
    limits = [
        norm / (limit * math.sqrt(part.key.m * part.key.n)) if part.key.sides else norm * 0
        for part, norm in zip(batch.parts, batch.split(norms), strict=True)
    ]
    return scale / (scale * batch.join(limits)).clamp(min=1)
