"""One optimizer step on one stack: statistics and moments, then roots, then the weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_kernels.optim import factors, moments
from shampoo_kernels.optim.moments import bias, block_norms, per_block
from shampoo_kernels.optim.stacks import Stack


@dataclass
class Inputs:
    """What the parameters of one group bring to a step; every tensor is a matrix (M, N)."""

    weights: list[Tensor]
    grads: dict[int, Tensor]  # of the parameters that have one; the others are left alone
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[int]  # gradients seen, this one included


def step_(stack: Stack, inputs: Inputs, group: dict, position: int) -> None:
    """Step the blocks whose parameter has a gradient.

    `position` counts the blocks with a factor before this stack. Blocks with a non-finite gradient
    keep weights, moments, statistics and roots bit for bit. The number of operations depends on
    the number of parts alone.
    """
    for start, part in stack.parts(inputs.grads):
        grad, moves = _look(part.pack(inputs.grads), group["maximize"])
        part.steps.add_(moves)
        factors.update_statistics_(part, grad, moves, group["shampoo_beta"], group["precision"])
        grad = grad.to(part.dtype)
        averages = part.pack(inputs.exp_avgs), part.pack(inputs.exp_avg_sqs)
        moments.update_(*averages, grad, moves, group["betas"])
        part.unpack_(inputs.exp_avgs, averages[0])
        part.unpack_(inputs.exp_avg_sqs, averages[1])
        if due := _due(part, inputs.steps, group, position + start):
            factors.refresh_roots_(part, due, moves, group)
        update, scale = _update(part, grad, moves, averages, inputs.steps, group)
        _apply_(part, inputs.weights, update, scale, moves, group)


def follow_(stack: Stack, inputs: Inputs, group: dict) -> None:
    """Bring the moments of blocks along that another rank steps, from the same gradient."""
    for _, part in stack.parts(inputs.grads):
        grad, moves = _look(part.pack(inputs.grads), group["maximize"])
        averages = part.pack(inputs.exp_avgs), part.pack(inputs.exp_avg_sqs)
        moments.update_(*averages, grad.to(part.dtype), moves, group["betas"])
        part.unpack_(inputs.exp_avgs, averages[0])
        part.unpack_(inputs.exp_avg_sqs, averages[1])


def _look(grad: Tensor, maximize: bool) -> tuple[Tensor, Tensor]:
    """The gradient (b, m, n) to minimise by, and moves (b,): 1, or 0 in blocks that are not finite.

    Those become zero, because 0 * NaN is not 0. Squares enter the moments, so that they count too.
    """
    norms = block_norms(grad)
    finite = norms.square() < math.inf
    grad = torch.where(per_block(finite), grad, 0)
    return grad.neg_() if maximize else grad, finite.to(norms.dtype)


def _due(part: Stack, steps: list[int], group: dict, position: int) -> Sequence[int]:
    """The blocks of `part` whose roots are computed in this step.

    A block at `position` among all blocks takes its turn when the gradients seen by its parameter
    leave the same rest, so that the same number is due in every step; positions, and with them
    turns, move when a parameter with earlier blocks joins. Out of turn comes a block without root:
    on a CPU when it has a statistic to compute it from, on other devices, where looking would
    mean waiting, when its parameter starts.
    """
    every, start, count = group["refresh_every"], group["start_step"], len(part.blocks)
    if not part.key.sides or max(steps[i] for i in part.parameters) < start:
        return ()
    own = [steps[block.parameter] for block in part.blocks]
    if part.device.type == "cpu":
        late = {i for i in factors.waiting(part) if own[i] >= start}
    else:
        late = {i for i in range(count) if own[i] == start}
    if len(late) == count:
        return range(count)
    if len(set(own)) == 1 and not late:
        return range((own[0] - position) % every, count, every)
    turns = (own[i] >= start and (own[i] - position - i) % every == 0 for i in range(count))
    return [i for i, turn in enumerate(turns) if turn or i in late]


def _update(
    part: Stack, grad: Tensor, moves: Tensor, averages: tuple[Tensor, Tensor], steps: list[int],
    group: dict,
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
    if preconditions and group["graft"] is None:
        update, _ = factors.apply_roots(part, momentum, group["precision"])
        return update, 1 / correction
    adam, scale = moments.direction(momentum, exp_avg_sq, part.steps, beta2, group["eps"])
    scale = scale / correction
    if not preconditions:
        return adam, scale
    update, norm = factors.apply_roots(part, momentum, group["precision"])
    ready = norm > 0  # without a root it is 0
    if len(started) < len(part.parameters):
        flags = torch.tensor([block.parameter in started for block in part.blocks])
        ready &= flags.to(part.device, non_blocking=True)
    return (
        torch.where(per_block(ready), update, adam),
        torch.where(ready, scale * block_norms(adam) / norm, scale),
    )


def _apply_(
    part: Stack, weights: list[Tensor], update: Tensor, scale: Tensor, moves: Tensor, group: dict
) -> None:
    """W <- (1 - lr * weight_decay) W - lr * scale * U, for the blocks that move."""
    lr = group["lr"]
    rate = (lr.reshape(()) if isinstance(lr, Tensor) else lr) * moves
    packed = part.pack(weights).to(part.dtype)
    if group["weight_decay"]:
        packed.mul_(per_block(1 - rate * group["weight_decay"]))
    packed.addcmul_(update, per_block(-rate * scale))
    part.unpack_(weights, packed)
