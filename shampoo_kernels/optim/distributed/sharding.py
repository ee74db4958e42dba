"""Which rank works on which block: a pure function of the global shapes.

Every rank computes it for itself and finds the same; nothing is exchanged.
"""

import heapq
import itertools
from collections.abc import Hashable, Sequence

from shampoo_kernels.optim.blocks import LEFT, Cut, StackKey, stack_blocks

# Flops of a root, per step and d³: 20 to 25 symmetric products of d³ each and their masters, or an
# eigh of about as many, every 10 steps. It does not follow refresh_every: an option that may change
# during a run must not move the state to another rank.
ROOT_FLOPS = 4


def cost(key: StackKey) -> int:
    """Flops per step of one m x n block: Gram matrices, preconditioning, its part of a refresh."""
    flops = 0
    for side in key.sides:
        d = key.m if side == LEFT else key.n
        gram, application = key.m * key.n * d, 2 * key.m * key.n * d  # the Gram matrix is symmetric
        flops += gram + application + ROOT_FLOPS * d**3
    return flops


def share_out(stacks: Sequence[tuple[int, int]], loads: list[int]) -> list[list[int]]:
    """Give equal blocks, the dearest first, each to the rank that has least to do.

    Args:
        stacks: (number of blocks, cost of one) of every stack.
        loads: what every rank has to do already; the costs given to it are added.

    Returns:
        For every stack the bounds (ranks + 1) of its ranks' runs: rank r has blocks
        bounds[r] to bounds[r + 1]. Runs of neighbours are as good as any other choice, since the
        blocks of a stack cost the same; and turns of refresh go round neighbours, so that every
        rank has the same number of roots to compute in every step.
    """
    counts = [[0] * len(loads) for _ in stacks]
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for number in sorted(range(len(stacks)), key=lambda i: (-stacks[i][1], i)):
        blocks, each = stacks[number]
        for _ in range(blocks):
            load, rank = heap[0]
            heapq.heapreplace(heap, (load + each, rank))
            counts[number][rank] += 1
    for load, rank in heap:
        loads[rank] = load
    return [list(itertools.accumulate(count, initial=0)) for count in counts]


def owners(
    cuts: Sequence[Cut], rest: Sequence[Hashable], loads: list[int]
) -> list[tuple[int, ...]]:
    """The rank of every block of every parameter; () for parameters without factors.

    `loads` (ranks,) grows by what was given out. Arguments as in `stack_blocks`.
    """
    stacks = [
        (key, blocks) for key, blocks in stack_blocks(cuts, rest).items() if key.sides
    ]  # fmt: skip
    ranks = [[0] * len(one.pieces) if one.sides else [] for one in cuts]
    shares = share_out([(len(blocks), cost(key)) for key, blocks in stacks], loads)
    for (_, blocks), bounds in zip(stacks, shares, strict=True):
        for rank, (start, stop) in enumerate(itertools.pairwise(bounds)):
            for block in blocks[start:stop]:
                ranks[block.parameter][block.index] = rank
    return [tuple(own) for own in ranks]
