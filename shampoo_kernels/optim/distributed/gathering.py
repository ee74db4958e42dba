"""Replicas bring each other's new weights together: flat buffers, one collective for each."""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_kernels.optim.blocks import Block, StackKey
from shampoo_kernels.optim.distributed.team import Team
from shampoo_kernels.optim.stacks import Matrices

# Bytes that one collective leaves on every rank. Two are in flight at most.
GATHER_BYTES = 256 << 20


@dataclass
class Bucket:
    """What one collective brings: from every rank the blocks of its list, one after the other."""

    rest: Any  # dtype and device of the parameters
    last: StackKey  # the stack with which it is complete
    blocks: list[list[Block]]  # by rank
    lengths: list[int]  # elements of each rank's blocks

    def bytes(self) -> int:
        """What it leaves on every rank, which sends as much as the rank that has most."""
        return max(self.lengths) * len(self.lengths) * self.rest[0].itemsize


def buckets(keys: Sequence[StackKey], runs: Sequence[list[list[Block]]]) -> list[Bucket]:
    """The collectives for the stacks of `keys`, whose blocks by rank are `runs`.

    Small stacks share one, and large ones take several, so that none leaves more than
    GATHER_BYTES, unless one block of every rank does.
    """
    result: list[Bucket] = []
    for key, run in zip(keys, runs, strict=True):
        size = key.m * key.n
        count = max(1, GATHER_BYTES // (size * key.rest[0].itemsize * len(run)))
        for first in range(0, max(map(len, run)), count):
            chunk = [own[first : first + count] for own in run]
            new = Bucket(key.rest, key, chunk, [len(own) * size for own in chunk])
            joined = _joined(result[-1], new) if result and result[-1].rest == key.rest else None
            if joined is not None and joined.bytes() <= GATHER_BYTES:
                result[-1] = joined
            else:
                result.append(new)
    return result


def _joined(a: Bucket, b: Bucket) -> Bucket:
    blocks = [own + more for own, more in zip(a.blocks, b.blocks, strict=True)]
    lengths = [own + more for own, more in zip(a.lengths, b.lengths, strict=True)]
    return Bucket(b.rest, b.last, blocks, lengths)


class Gather:
    """The collectives of one step; they run while the next stacks are worked on."""

    def __init__(self, plan: list[Bucket], weights: Matrices, team: Team) -> None:
        self.waiting = deque(plan)
        self.weights, self.team = weights, team
        self.flying: deque[tuple[Bucket, Tensor, Tensor, Any]] = deque()

    def ready(self, stack: StackKey) -> None:
        """The own blocks of this stack and of those before it have their new weights."""
        while self.waiting and self.waiting[0].last == stack:
            if len(self.flying) == 2:
                self._land()
            self._launch(self.waiting.popleft())

    def finish(self) -> None:
        """Every block has its new weights."""
        while self.flying:
            self._land()

    def _launch(self, bucket: Bucket) -> None:
        dtype, device = bucket.rest
        length = max(bucket.lengths)
        own = torch.empty(length, dtype=dtype, device=device)
        everyone = torch.empty(self.team.size * length, dtype=dtype, device=device)
        _copy(self._slots(bucket, self.team.rank, own), into_the_buffer=True)
        work = all_gather(everyone, own, self.team.process_group)
        self.flying.append((bucket, everyone, own, work))  # both buffers live until it has ended

    def _land(self) -> None:
        bucket, everyone, _, work = self.flying.popleft()
        work.wait()
        parts = everyone.view(self.team.size, -1).unbind()
        slots = (
            self._slots(bucket, rank, part)
            for rank, part in enumerate(parts) if rank != self.team.rank
        )  # fmt: skip
        _copy(itertools.chain.from_iterable(slots), into_the_buffer=False)

    def _slots(self, bucket: Bucket, rank: int, part: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(block among the weights, its place in `part`)."""
        start = 0
        for block in bucket.blocks[rank]:
            weight = self.weights[block.parameter][block.rows, block.cols]
            stop = start + weight.numel()
            yield weight, part[start:stop].view(weight.shape)
            start = stop


def _copy(slots: Iterator[tuple[Tensor, Tensor]], *, into_the_buffer: bool) -> None:
    pairs = list(slots)
    if pairs:
        blocks, places = map(list, zip(*pairs, strict=True))
        if into_the_buffer:
            torch._foreach_copy_(places, blocks)
        else:
            torch._foreach_copy_(blocks, places)


def all_gather(everyone: Tensor, own: Tensor, process_group: Any) -> Any:
    """Start it. torch 2.13 gave the collective another name."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(everyone, own, group=process_group, async_op=True)
