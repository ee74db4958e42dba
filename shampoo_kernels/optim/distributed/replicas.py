"""Parameters that every rank holds whole, as under DistributedDataParallel.

Every rank steps the blocks that it owns and sends their new weights to the others, in the dtype of
the parameters: replicas are equal to the bit because they are copies. Statistics and roots are with
the owner alone. The moments are with everyone, parameter-shaped, and everyone brings them along
from the same gradient: that is less work than sending them, and leaves them where a checkpoint or
another number of ranks looks for them. Blocks without factors are stepped by every rank.
"""

from collections.abc import Mapping

from torch import Tensor

from shampoo_kernels.optim.batch import batches
from shampoo_kernels.optim.blocks import Block, stack_blocks
from shampoo_kernels.optim.distributed.gathering import Gather, buckets
from shampoo_kernels.optim.distributed.team import Share
from shampoo_kernels.optim.plan import Plan
from shampoo_kernels.optim.stacks import Stack
from shampoo_kernels.optim.update import Inputs, follow_, step_


class ReplicaPlan(Plan):
    """A Plan that steps the blocks of one rank and gathers those of the others."""

    def __init__(self, group: dict, states: Mapping[Tensor, dict], share: Share) -> None:
        super().__init__(group, states, share)
        self.team = share.team
        places = [(parameter.dtype, parameter.device) for parameter in self.parameters]
        every = stack_blocks(self.cuts, places)
        shared = [stack for stack in self.stacks if stack.key.sides]
        self.others = [_stack_of_others(stack, every[stack.key]) for stack in shared]
        runs = [share.runs(self.parameters, every[stack.key]) for stack in shared]
        self.buckets = buckets([stack.key for stack in shared], runs)

    def step_(self, group: dict) -> None:
        inputs = self._inputs()
        coupled = group["weight_decay"] and not group["decoupled_weight_decay"]
        if coupled:  # the gradient holds the weights as they are before the step
            self._follow(inputs, group)
        gather = Gather(self.buckets, inputs.weights, self.team)
        for stack in self.stacks:
            for batch in batches([stack], inputs.grads, self.moments):
                step_(batch, inputs, group)
            if stack.key.sides:
                gather.ready(stack.key)
        if not coupled:  # while weights travel
            self._follow(inputs, group)
        gather.finish()
        self._write_back(inputs.weights, range(len(self.parameters)))

    def _follow(self, inputs: Inputs, group: dict) -> None:
        for batch in batches(self.others, inputs.grads, self.moments):
            follow_(batch, inputs, group)


def _stack_of_others(stack: Stack, blocks: list[Block]) -> Stack:
    """The blocks that other ranks own: no statistics, no roots, no counts."""
    stop = stack.first + len(stack.blocks)
    others = blocks[: stack.first] + blocks[stop:]
    return Stack(stack.key, others, stack.dtype, stack.device, stack.steps.new_empty(0))
