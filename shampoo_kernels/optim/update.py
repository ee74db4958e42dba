"""One optimizer step on one stack: statistics and moments, then roots, then the weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_kernels.optim import factors, moments
from shampoo_kernels.optim.moments import bias, block_norms, per_block
from shampoo_kernels.optim.stacks import Stack


@dataclass
class Members:
    """What the parameters of one group bring to a step; every tensor is a matrix (M, N)."""

    weights: list[Tensor]
    grads: list[Tensor]  # a missing one is a zero that takes no memory
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    present: list[bool]  # has a gradient in this step
    steps: list[int]  # gradients seen, this one included


class StackStep:
    """A step of the blocks whose parameter has a gradient, where that is finite.

    The other blocks keep statistics, moments and weights bit for bit, and blocks with a non-finite
    gradient their roots too. The number of operations depends on the number of parts alone.
    """

    def __init__(self, stack: Stack, members: Members, group: dict) -> None:
        self.stack, self.members, self.group = stack, members, group
        self.present = [i for i in stack.members if members.present[i]]
        self.finite = torch.empty(len(stack.blocks), dtype=torch.bool, device=stack.device)
        self.moves = torch.empty_like(stack.steps)  # (B,): 1 or 0

    def run(self) -> None:
        if not self.present:
            return
        parts = self.stack.parts()
        has_grad = self._blocks_with(lambda i: self.members.present[i])
        for part in parts:
            self._accumulate(part, None if has_grad is None else has_grad[part])
        t = max(self.members.steps[i] for i in self.present)
        preconditions = bool(self.stack.key.sides) and t >= self.group["start_step"]
        if preconditions:
            for chosen in self._due(t):
                factors.refresh_roots_(self.stack, chosen, ~self.finite, self.group)
        started = self._blocks_with(lambda i: self.members.steps[i] >= self.group["start_step"])
        for part in parts:
            update, scale = self._update(part, preconditions, started)
            self._apply(part, update, scale)

    def _blocks_with(self, holds: Callable[[int], bool]) -> Tensor | None:
        """(B,) bool: does it hold for the block's parameter; None where it holds for all."""
        if all(holds(i) for i in self.stack.members):
            return None
        flags = [holds(block.parameter) for block in self.stack.blocks]
        return torch.tensor(flags, device=self.stack.device)

    def _accumulate(self, part: slice, has_grad: Tensor | None) -> None:
        """Look at the gradients, and take them into statistics, moments and step counts."""
        stack, group = self.stack, self.group
        grad = stack.pack(self.members.grads, part)
        finite = block_norms(grad).isfinite()
        self.finite[part] = finite
        self.moves[part] = finite if has_grad is None else finite & has_grad
        grad, moves = self._clean(grad, finite), self.moves[part]
        stack.steps[part].add_(moves)
        factors.update_statistics_(
            stack, part, grad, moves, group["shampoo_beta"], group["precision"]
        )
        exp_avg = stack.pack(self.members.exp_avgs, part)
        exp_avg_sq = stack.pack(self.members.exp_avg_sqs, part)
        moments.update_(exp_avg, exp_avg_sq, grad, moves, group["betas"])
        stack.unpack_(self.members.exp_avgs, part, exp_avg)
        stack.unpack_(self.members.exp_avg_sqs, part, exp_avg_sq)

    def _clean(self, grad: Tensor, finite: Tensor) -> Tensor:
        """Zero in place of what is not finite, because 0 * NaN is not 0; the sign to minimise."""
        grad = torch.where(per_block(finite), grad, 0)
        return grad.neg_() if self.group["maximize"] else grad

    def _due(self, t: int) -> list[slice]:
        """The blocks whose roots are refreshed now: slice t of them, and parameters that start."""
        every, start = self.group["refresh_every"], self.group["start_step"]
        starting = {i for i in self.present if self.members.steps[i] == start}
        if len(starting) == len(self.stack.members):
            return [slice(None)]
        blocks = self.stack.blocks
        late = [slice(i, i + 1) for i, b in enumerate(blocks) if b.parameter in starting]
        return [slice(t % every, None, every), *late]

    def _update(
        self, part: slice, preconditions: bool, started: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """U (b, m, n) and scale (b,): scale * U is what the learning rate multiplies."""
        stack, group = self.stack, self.group
        (beta1, beta2), steps = group["betas"], stack.steps[part]
        momentum = stack.pack(self.members.exp_avgs, part)
        correction = bias(steps, beta1)
        if group["nesterov"]:
            grad = self._clean(stack.pack(self.members.grads, part), self.finite[part])
            momentum = moments.look_ahead(momentum, grad, self.moves[part], beta1)
            correction = bias(steps + 1, beta1)
        if preconditions and group["graft"] is None:
            update, _ = factors.apply_roots(stack, part, momentum, group["precision"])
            return update, 1 / correction
        exp_avg_sq = stack.pack(self.members.exp_avg_sqs, part)
        adam, scale = moments.direction(momentum, exp_avg_sq, steps, beta2, group["eps"])
        scale = scale / correction
        if not preconditions:
            return adam, scale
        update, norm = factors.apply_roots(stack, part, momentum, group["precision"])
        grafted = torch.where(norm > 0, scale * block_norms(adam) / norm, 0)
        if started is None:
            return update, grafted
        started = started[part]
        return (
            torch.where(per_block(started), update, adam),
            torch.where(started, grafted, scale),
        )

    def _apply(self, part: slice, update: Tensor, scale: Tensor) -> None:
        """W <- (1 - lr * weight_decay) W - lr * scale * U, for the blocks that move."""
        lr = self.group["lr"]
        rate = (lr.reshape(()) if isinstance(lr, Tensor) else lr) * self.moves[part]
        weights = self.stack.pack(self.members.weights, part)
        if self.group["weight_decay"]:
            weights.mul_(per_block(1 - rate * self.group["weight_decay"]))
        weights.addcmul_(update, per_block(-rate * scale))
        self.stack.unpack_(self.members.weights, part, weights)
