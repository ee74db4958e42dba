"""Blocks of parameters of which every rank holds some rows: pieces to the owner, and back.

Which rows travel where is a function of the global shapes alone, so that every rank knows what the
others send without asking.
"""

import bisect
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_kernels.optim.blocks import Block, StackKey
from shampoo_kernels.optim.distributed.team import Team

Bounds = Sequence[Sequence[int]]  # by parameter and rank: its rows are bounds[rank:rank + 2]


@dataclass(frozen=True)
class Piece:
    """Rows of one block that are with one rank: where in its own rows, and where in the block."""

    parameter: int
    there: slice  # of the rows which that rank holds
    cols: slice
    place: int  # of the block among those of its owner in this chunk
    here: slice  # of the rows of the block

    def numel(self) -> int:
        return (self.here.stop - self.here.start) * (self.cols.stop - self.cols.start)


@dataclass(frozen=True)
class Chunk:
    """Blocks of one shape that travel together, to all their owners at once."""

    key: StackKey
    blocks: list[Block]  # those of this rank
    start: int  # the first of them, among those of this rank
    sends: list[list[Piece]]  # by owner: what this rank has of the owner's blocks
    receives: list[list[Piece]]  # by rank: what it has of this rank's blocks


def row_bounds(shape: Sequence[int], rows: int, ranks: int) -> list[int]:
    """Bounds (ranks + 1) of the rows of a matrix with so many rows, seen as in `matrix_shape`.

    Shard(0) cuts the first dimension as torch.chunk does: equal parts, the last ones smaller or
    empty.
    """
    part = -(-shape[0] // ranks) * (rows // shape[0])
    return [min(rank * part, rows) for rank in range(ranks + 1)]


def pieces(blocks: Sequence[Block], bounds: Bounds, rank: int) -> list[Piece]:
    """What `rank` has of `blocks`."""
    return [
        piece
        for place, block in enumerate(blocks)
        if (piece := _piece(place, block, bounds[block.parameter], rank)) is not None
    ]


def _piece(place: int, block: Block, bounds: Sequence[int], rank: int) -> Piece | None:
    low, high = bounds[rank], bounds[rank + 1]
    start, stop = max(low, block.rows.start), min(high, block.rows.stop)
    if start >= stop:
        return None
    there = slice(start - low, stop - low)
    here = slice(start - block.rows.start, stop - block.rows.start)
    return Piece(block.parameter, there, block.cols, place, here)


def chunks(
    key: StackKey, runs: list[list[Block]], bounds: Bounds, rank: int, most: int
) -> list[Chunk]:
    """Cut the ranks' runs of one stack into chunks, each a slice of every run.

    No rank sends or receives more than `most` elements in a chunk, as far as one block of every
    owner allows.
    """
    count = max(1, most // (key.m * key.n))
    longest = max(map(len, runs))
    while count > 1 and _most_sent(runs, bounds, count) > most:
        count //= 2
    result = []
    for first in range(0, longest, count):
        parts = [run[first : first + count] for run in runs]
        result.append(
            Chunk(
                key,
                parts[rank],
                first,
                [pieces(part, bounds, rank) for part in parts],
                [pieces(parts[rank], bounds, other) for other in range(len(runs))],
            )
        )
    return result


def _most_sent(runs: list[list[Block]], bounds: Bounds, count: int) -> int:
    """The most elements that one rank sends in one chunk of `count` blocks of every owner."""
    sent = 0
    for first in range(0, max(map(len, runs)), count):
        by_rank: Counter[int] = Counter()
        for block in itertools.chain(*(run[first : first + count] for run in runs)):
            of_rank = bounds[block.parameter]
            rank = bisect.bisect_right(of_rank, block.rows.start) - 1
            while rank < len(runs) and of_rank[rank] < block.rows.stop:
                piece = _piece(0, block, of_rank, rank)
                by_rank[rank] += piece.numel() if piece is not None else 0
                rank += 1
        sent = max(sent, *by_rank.values())
    return sent


class Swap:
    """One all-to-all of views, running until `finish`: sources[rank] become that rank's targets."""

    def __init__(
        self, sources: list[list[Tensor]], targets: list[list[Tensor]], like: Tensor, team: Team
    ) -> None:
        outgoing, incoming = (
            [sum(view.numel() for view in views) for views in lists] for lists in (sources, targets)
        )
        views = list(itertools.chain(*sources))
        self.targets = list(itertools.chain(*targets))
        self.sent, self.received = like.new_empty(sum(outgoing)), like.new_empty(sum(incoming))
        if views:
            torch._foreach_copy_(_places(self.sent, views), views)
        self.work: Any = dist.all_to_all_single(
            self.received, self.sent, incoming, outgoing, group=team.process_group, async_op=True
        )

    def finish(self) -> None:
        self.work.wait()
        if self.targets:
            torch._foreach_copy_(self.targets, _places(self.received, self.targets))


def _places(flat: Tensor, views: Sequence[Tensor]) -> list[Tensor]:
    """`flat` as tensors of the shapes of `views`, one behind the other."""
    places, start = [], 0
    for view in views:
        places.append(flat[start : start + view.numel()].view(view.shape))
        start += view.numel()
    return places
