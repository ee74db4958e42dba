"""Parts of stacks that are stepped together: what all their blocks go through is one call."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_kernels.ops.pack import Pieces
from shampoo_kernels.optim import stacks
from shampoo_kernels.optim.stacks import HALVES, Matrices, Stack


class Moments(NamedTuple):
    """Of the parameters of a group, by number, as matrices (M, N) that are views."""

    exp_avgs: Mapping[int, Tensor]
    exp_avg_sqs: Mapping[int, Tensor]  # of the parameters that have one


class Batch:
    """Parts of one parameter dtype on one device, all with factors or all without.

    Numbers of each block are (blocks,), in order.
    """

    def __init__(self, parts: Sequence[tuple[Stack, int, Stack]], moments: Moments) -> None:
        """`parts`: (stack, number of the first block that is in the part, part)."""
        self._origins = [(stack, start) for stack, start, _ in parts]
        self.parts = [part for _, _, part in parts]
        self.averages = [_averages(part, moments) for part in self.parts]
        self.sizes = [len(part.blocks) for part in self.parts]
        self.dtype, self.device = self.parts[0].dtype, self.parts[0].device
        self.has_factors = bool(self.parts[0].key.sides)
        self.parameters = sorted({i for part in self.parts for i in part.parameters})

    def places(self) -> list[int]:
        """Of the first block of every part: what turns go by."""
        return [stack.place + start for stack, start in self._origins]

    def count_(self, moves: Tensor) -> Tensor:
        """Count the gradients of the blocks that move; returns those seen (blocks,)."""
        steps = [part.steps for part in self.parts]
        torch._foreach_add_(steps, self.split(moves))
        return self.join(steps)

    def split(self, x: Tensor) -> list[Tensor]:
        """(blocks,) by part."""
        return list(x.split(self.sizes))

    def join(self, numbers: Sequence[Tensor]) -> Tensor:
        """Those of each part as (blocks,)."""
        return numbers[0] if len(numbers) == 1 else torch.cat(list(numbers))

    def empty(self, dtype: torch.dtype) -> list[Tensor]:
        """A stack (b, m, n) for each part."""
        return [
            torch.empty(size, part.key.m, part.key.n, dtype=dtype, device=self.device)
            for size, part in zip(self.sizes, self.parts, strict=True)
        ]

    def gradients(self, grads: Matrices, negate: bool) -> tuple[list[Tensor], Tensor]:
        """Stacks in the dtype of the state, 16-bit ones as they are, and moves (blocks,).

        moves is 1, or 0 for a block that is not finite, which becomes 0, because 0 * NaN is not 0.
        Squares enter the moments, so that they count too.
        """
        pieces = self.pieces(grads)
        dtype = pieces[0].dtype if pieces[0].dtype in HALVES else self.dtype
        packed = self.empty(dtype)
        squares = Pieces(pieces, packed).pack_finite_(negate)
        return packed, (squares.to(self.dtype) < torch.inf).to(self.dtype)

    def pack(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """The blocks as stacks in the dtype of the state."""
        packed = self.empty(self.dtype)
        Pieces(pieces, packed).pack_()
        return packed

    def apply_(
        self, matrices: Matrices, decay: Tensor, step: Tensor, updates: Sequence[Tensor]
    ) -> None:
        """W <- decay W + step U for every block, decay and step (blocks,)."""
        Pieces(self.pieces(matrices), updates).apply_(decay, step)

    def pieces(self, matrices: Matrices) -> list[Tensor]:
        """The blocks as views of matrices[parameter], part by part."""
        return [piece for part in self.parts for piece in part.pieces(matrices)]


def batches(every: Iterable[Stack], present: Container[int], moments: Moments) -> Iterator[Batch]:
    """The blocks of the parameters in `present`, in batches whose packed form takes at most
    PART_BYTES."""
    waiting: dict[tuple, list[tuple[Stack, int, Stack]]] = {}
    room: dict[tuple, int] = {}
    for stack in every:
        alike = bool(stack.key.sides), stack.key.rest
        for start, part in stack.parts(present):
            size = part.bytes()
            if size > room.get(alike, 0) and waiting.get(alike):
                yield Batch(waiting.pop(alike), moments)
            if not waiting.get(alike):
                room[alike] = stacks.PART_BYTES
            waiting.setdefault(alike, []).append((stack, start, part))
            room[alike] -= size
    for parts in waiting.values():
        yield Batch(parts, moments)


def _averages(part: Stack, moments: Moments) -> tuple[list[Tensor], list[Tensor] | None]:
    squared = part.parameters[0] in moments.exp_avg_sqs
    return part.pieces(moments.exp_avgs), part.pieces(moments.exp_avg_sqs) if squared else None
