"""Parameters of which every rank holds some rows: DTensors as fully_shard makes them.

The pieces of a block (weights, gradient, moments) travel to its owner, who steps the whole block as
a single process would, and travel back: a chunk of a stack at a time, the next one on its way
meanwhile. Statistics and roots stay with the owner; the moments are DTensors like their parameter.
Blocks without factors are stepped where their rows are; all ranks ask each other whether they are
finite.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_kernels.optim import stacks
from shampoo_kernels.optim.batch import Moments, batches
from shampoo_kernels.optim.blocks import Block, Cut, stack_blocks
from shampoo_kernels.optim.distributed.exchange import Chunk, Swap, chunks, row_bounds
from shampoo_kernels.optim.distributed.team import Share, Team
from shampoo_kernels.optim.plan import Plan
from shampoo_kernels.optim.stacks import Matrices, Stack, cut_parameter, state_dtype
from shampoo_kernels.optim.update import Inputs, step_

# What travels to the owner of a block, and what comes back.
WEIGHT, GRAD, EXP_AVG, EXP_AVG_SQ = range(4)
BACK = (WEIGHT, EXP_AVG, EXP_AVG_SQ)


@dataclass(frozen=True)
class Job:
    """One chunk of one stack; `part` has the own blocks, each as a parameter of its own."""

    chunk: Chunk
    stack: Stack
    part: Stack
    moments: list[int]

    def channels(self) -> list[tuple[torch.dtype, list[int]]]:
        """What travels in which dtype."""
        dtype = self.chunk.key.rest[0]
        if dtype == self.part.dtype:
            return [(dtype, [WEIGHT, GRAD, *self.moments])]
        return [(dtype, [WEIGHT, GRAD]), (self.part.dtype, self.moments)]


class ShardPlan(Plan):
    """A Plan for DTensors that are cut along their first dimension.

    Where the mesh has copies of the shards too, every copy does the same work.
    """

    def __init__(self, group: dict, states: Mapping[Tensor, dict], share: Share) -> None:
        super().__init__(group, states, share)
        self.team = share.team
        bounds = [
            row_bounds(parameter.shape, one.matrix[0], self.team.size) if one.sides else []
            for parameter, one in zip(self.parameters, self.cuts, strict=True)
        ]
        places = [(parameter.dtype, parameter.device) for parameter in self.parameters]
        every = stack_blocks(self.cuts, places)
        self.jobs = []
        for stack in self.stacks:
            if stack.key.sides:
                runs = share.runs(self.parameters, every[stack.key])
                squared = every[stack.key][0].parameter in self.squares
                moments = [EXP_AVG, EXP_AVG_SQ] if squared else [EXP_AVG]
                most = stacks.PART_BYTES // (4 * stack.dtype.itemsize)
                for chunk in chunks(stack.key, runs, bounds, self.team.rank, most):
                    self.jobs.append(_job(stack, chunk, moments))
        self.local = [stack for stack in self.stacks if not stack.key.sides]
        for i, one in enumerate(self.cuts):  # from global to own rows
            if one.sides:
                rows = bounds[i][self.team.rank + 1] - bounds[i][self.team.rank]
                self.shapes[i] = (rows, one.matrix[1])

    def step_(self, group: dict) -> None:
        inputs = self._inputs()
        tensors: list[Matrices] = [
            inputs.weights,
            [self._gradient(inputs, i) for i in range(len(self.parameters))],
            *self.moments,
        ]
        visits = (Visit(job, tensors, self.team) for job in self.jobs)  # they set out when made
        here, leaving = next(visits, None), None
        while here is not None:
            here.wait()
            coming = next(visits, None)
            here.step_(inputs, group)
            if leaving is not None:
                leaving.wait()
            here.return_()
            here, leaving = coming, here
        if leaving is not None:
            leaving.wait()
        with self._of_one_mind(inputs) as finite:
            for stack in self.local:
                if stack.key.n:
                    for batch in batches([stack], inputs.grads, self.moments):
                        step_(batch, inputs, group)
                else:  # no rows of these parameters are here
                    stack.steps.add_(torch.stack([finite[b.parameter] for b in stack.blocks]))
        self._write_back(inputs.weights, range(len(self.parameters)))

    def _cuts(self, group: dict) -> list[Cut]:
        """Global, but parameters without factors are one row of what is here."""
        cuts = [cut_parameter(parameter, group) for parameter in self.parameters]
        for i, one in enumerate(cuts):
            if not one.sides and one.pieces:
                n = self._held(self.parameters[i]).numel()
                cuts[i] = Cut((1, n), (), ((slice(0, 1), slice(0, n)),))
        return cuts

    def _held(self, tensor: Tensor) -> Tensor:
        return tensor.to_local()  # type: ignore[attr-defined]

    def _gradient(self, inputs: Inputs, i: int) -> Tensor:
        """A gradient that is missing here counts as not finite: the owner might have one."""
        if i in inputs.grads:
            return inputs.grads[i]
        weight = inputs.weights[i]
        return weight.new_full((1, 1), math.nan).expand_as(weight)

    @contextmanager
    def _of_one_mind(self, inputs: Inputs) -> Iterator[dict[int, Tensor]]:
        """Blocks without factors: where one rank's rows are not finite, make all ranks' so.

        Gives 1 or 0 for every parameter. The gradients get one NaN, which is taken back.
        """
        asked = [i for i, one in enumerate(self.cuts) if not one.sides and one.pieces]
        if not asked:
            yield {}
            return
        grads = [self._gradient(inputs, i) for i in asked]
        widest = max((state_dtype(grad.dtype) for grad in grads), key=lambda dtype: dtype.itemsize)
        norms = torch._foreach_norm(grads, 2, widest)
        squares = torch.stack(norms).square()
        dist.all_reduce(squares, group=self.team.process_group)
        finite = (squares < math.inf).to(squares.dtype)
        poison = torch.where(finite > 0, 0, math.nan).view(-1, 1, 1).unbind()
        here = [k for k, i in enumerate(asked) if i in inputs.grads and self.shapes[i][1]]
        spots = [inputs.grads[asked[k]][:1, :1] for k in here]
        saved = list(torch._foreach_mul(spots, 1)) if spots else []
        if spots:
            torch._foreach_add_(spots, [poison[k] for k in here])
        try:
            yield dict(zip(asked, finite.unbind(), strict=True))
        finally:
            if spots:
                torch._foreach_copy_(spots, saved)


class Visit:
    """The blocks of one job, on their way to their owners, there, and on their way back."""

    def __init__(self, job: Job, tensors: list[Matrices], team: Team) -> None:
        self.job, self.tensors, self.team = job, tensors, team
        count, key = len(job.chunk.blocks), job.chunk.key
        self.packed: dict[int, Tensor] = {}  # (b, m, n) of each of the four
        self.swaps: list[Swap] = []
        for dtype, names in job.channels():
            buffer = torch.empty(
                len(names), count, key.m, key.n, dtype=dtype, device=job.part.device
            )
            self.packed.update(zip(names, buffer.unbind(), strict=True))
            self.swaps.append(Swap(self._spread(names), self._whole(names), buffer, team))

    def wait(self) -> None:
        for swap in self.swaps:
            swap.finish()
        self.swaps = []

    def step_(self, inputs: Inputs, group: dict) -> None:
        blocks = self.job.chunk.blocks
        if not blocks:
            return
        weights, grads, exp_avgs, *squares = (
            dict(enumerate(self.packed[name].unbind()))
            for name in (WEIGHT, GRAD, *self.job.moments)
        )
        present = [j for j, block in enumerate(blocks) if block.parameter in inputs.grads]
        steps = [inputs.steps[block.parameter] for block in blocks]
        own = Inputs(weights, {j: grads[j] for j in present}, steps)
        part = replace(self.job.part, place=self.job.stack.place + self.job.chunk.start)
        moments = Moments(exp_avgs, squares[0] if squares else {})
        for batch in batches([part], own.grads, moments):
            step_(batch, own, group)

    def return_(self) -> None:
        for _, names in self.job.channels():
            back = [name for name in names if name in BACK]
            like = self.packed[back[0]]
            self.swaps.append(Swap(self._whole(back), self._spread(back), like, self.team))
        self.packed = {}

    def _spread(self, names: list[int]) -> list[list[Tensor]]:
        """What this rank has, by owner."""
        return [
            [self.tensors[name][p.parameter][p.there, p.cols] for name in names for p in pieces]
            for pieces in self.job.chunk.sends
        ]

    def _whole(self, names: list[int]) -> list[list[Tensor]]:
        """The same places in the blocks of this rank, by the rank that has them."""
        return [
            [self.packed[name][p.place, p.here] for name in names for p in pieces]
            for pieces in self.job.chunk.receives
        ]


def _job(stack: Stack, chunk: Chunk, moments: list[int]) -> Job:
    count, key = len(chunk.blocks), stack.key
    part = stack.part(slice(chunk.start, chunk.start + count))
    whole = slice(0, key.m), slice(0, key.n)
    blocks = [Block(j, block.index, *whole) for j, block in enumerate(chunk.blocks)]
    part = replace(part, blocks=blocks)
    return Job(chunk, stack, part, moments)
