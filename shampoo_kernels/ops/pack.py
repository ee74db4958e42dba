"""Pieces of many tensors, packed into stacks and updated from them in one call; not a public op.

What an optimizer does around its kernels: gather the blocks of all gradients, whatever their dtypes
and strides, and apply the preconditioned blocks to the weights.
"""

import functools
import itertools
import math
from array import array
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shampoo_kernels.chooser import choose_for
from shampoo_kernels.ops import common
from shampoo_kernels.ops.norms import block_norms, per_block

_OP = "pack"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # kernels.h
_CHUNK = 8192  # kChunkElements of kernels.h
# Elements of a mean piece from which plain copies on a CPU are torch's: one call for all pieces
# saves nothing any more, and torch rounds to 16 bits faster. On one Zen 5 core torch is 1.0 to 1.3
# times as fast in float32, from bfloat16 1.0 to 1.2, to bfloat16 1.4 to 2.4; below, native is 1.0
# to 2.6 times (2026-11-25).
_LARGE_PACKED, _LARGE_UNPACKED = 1 << 15, 1 << 14


class Pieces:
    """Views `data[i]` (m, n), any float dtype and strides, and their places in `stacks`, contiguous
    tensors (b, m, n) of any float dtype, in order: the blocks of gradients, say, stack by stack.
    The pieces of one stack have one dtype.

    All on one device. The table of pointers is made when it is first needed and reaches the device
    without a synchronisation; it holds for as long as the tensors keep their memory, which this
    object keeps alive. A CUDA graph holds tables of its own, and needs the tensors alone to stay.
    No piece may overlap another or a stack.

    Raises:
        TypeError: a dtype that is not float64, float32, bfloat16 or float16; ValueError: shapes
        that differ, a stack that is not contiguous, tensors of several devices.
    """

    def __init__(self, data: Sequence[Tensor], stacks: Sequence[Tensor]):
        self.data, self.stacks = list(data), list(stacks)
        self._table: tuple[Tensor, Tensor] | None = None
        places = sum(stack.shape[0] for stack in self.stacks)
        if len(self.data) != places:
            raise ValueError(f"{_OP}: got {len(self.data)} pieces and {places} places for them")
        for stack, pieces in self._by_stack():
            _check(stack, pieces, self.stacks[0].device)
        wide = torch.float64 in {tensor.dtype for tensor in (*self.data, *self.stacks)}
        self.factor_dtype = torch.float64 if wide else torch.float32

    def _by_stack(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Every stack and its pieces."""
        start = 0
        for stack in self.stacks:
            stop = start + stack.shape[0]
            yield stack, self.data[start:stop]
            start = stop

    @property
    def table(self) -> tuple[Tensor, Tensor]:
        """Piece and PieceChunk of kernels.h: int64 (pieces, 8), int32 (chunks, 2)."""
        if self.stacks and capturing(self.stacks[0].device):  # what is captured has not run yet
            return self._make_table()
        if self._table is None:
            self._table = self._make_table()
        return self._table

    def _make_table(self) -> tuple[Tensor, Tensor]:
        numbers = array("q")
        counts: list[int] = []
        for stack, pieces in self._by_stack():
            count, m, n = stack.shape
            place, size = stack.data_ptr(), m * n * stack.element_size()
            kinds = _DTYPES[pieces[0].dtype if pieces else stack.dtype], _DTYPES[stack.dtype]
            for piece in pieces:
                numbers.extend((piece.data_ptr(), place, m, n, *piece.stride(), *kinds))
                place += size
            counts += [m * n] * count
        device = self.stacks[0].device if self.stacks else torch.device("cpu")
        return on_device(numbers, 8, device), chunks(tuple(counts), device)

    def pack_(self) -> None:
        """stacks[i] <- data[i], cast."""
        if self._native() and not self._large(_LARGE_PACKED):
            torch.ops.shampoo_kernels_native.pack_(*self.table)
            return
        for stack, pieces in self._by_stack():
            _gather_(stack, pieces)

    def pack_finite_(self, negate: bool = False) -> Tensor:
        """stacks[i] <- data[i], with `negate` -data[i], or 0 where data[i] has numbers that are not
        finite or whose squares overflow (in float32; in float64 for float64 data).

        Returns:
            Tensor (pieces,): the squared norms of data, not finite for those that became 0.
                float64.
        """
        if self._native():
            return torch.ops.shampoo_kernels_native.pack_finite_(*self.table, negate)
        self.pack_()
        squares = []
        for stack, pieces in self._by_stack():
            if not pieces:
                continue
            judged = stack if stack.dtype == pieces[0].dtype else torch.stack(pieces)
            square = block_norms(judged).square()
            stack.masked_fill_(per_block(~(square < math.inf)), 0)
            if negate:
                stack.neg_()
            squares.append(square.double())
        return torch.cat(squares) if squares else torch.empty(0, dtype=torch.float64, device="cpu")

    def unpack_(self) -> None:
        """data[i] <- stacks[i], cast."""
        if self._native() and not self._large(_LARGE_UNPACKED):
            torch.ops.shampoo_kernels_native.unpack_apply_(*self.table, None, None)
        elif self.data:
            torch._foreach_copy_(self.data, self._places())

    def apply_(self, decay: Tensor, step: Tensor) -> None:
        """data[i] <- decay[i] * data[i] + step[i] * stacks[i].

        In float32, or float64 where one of the two is, rounded once to the dtype of the piece. For
        W <- (1 - lr wd) W - lr s U: decay = 1 - lr wd, step = -lr s. decay[i] = 0 does not read
        data[i], step[i] = 0 does not read the stack; with decay[i] = 1 too data[i] keeps its bits.

        Args:
            decay, step: (pieces,) of `factor_dtype`: float64 where one of the tensors is, else
                float32; on the device of the pieces.
        """
        for name, factor in (("decay", decay), ("step", step)):
            common.check_dtype(_OP, name, factor, (self.factor_dtype,))
            common.check_shape(_OP, name, factor, (len(self.data),), "one for each piece")
        if self._native():
            factors = decay.contiguous(), step.contiguous()
            torch.ops.shampoo_kernels_native.unpack_apply_(*self.table, *factors)
            return
        start = 0
        for stack, pieces in self._by_stack():
            part = slice(start, start := start + len(pieces))
            if pieces:
                _apply_(pieces, stack, per_block(decay[part]), per_block(step[part]))

    def _places(self) -> list[Tensor]:
        return [place for stack in self.stacks for place in stack.unbind()]

    def _native(self) -> bool:
        return bool(self.data) and native(self.data[0])

    def _large(self, elements: int) -> bool:
        packed = sum(stack.numel() for stack in self.stacks)
        return self.data[0].is_cpu and packed >= elements * len(self.data)


def native(tensor: Tensor) -> bool:
    """Whether the native kernels take pieces on the device of this tensor."""
    return choose_for(_OP, tensor, torch.float32) == "native"


def capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """PieceChunk of kernels.h for pieces of so many elements: int32 (chunks, 2)."""
    if capturing(device):
        return _captured_chunks(sizes, device)
    cuda = device.type == "cuda"
    return _chunks(sizes, device, torch.cuda.current_stream(device).cuda_stream if cuda else 0)


@functools.lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """One for each stream, on which the copy to the device is in order with the kernels."""
    found = [(i, c) for i, size in enumerate(sizes) for c in range(-(-size // _CHUNK))]
    return _move(torch.tensor(found, dtype=torch.int32, device="cpu").view(-1, 2), device)


def _captured_chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Made on the device from where every piece starts: a graph has no memory of the host's."""
    counts = [-(-size // _CHUNK) for size in sizes]
    ends = list(itertools.accumulate(counts))
    starts = [end - count for end, count in zip(ends, counts, strict=True)]
    places = on_device(array("q", starts + ends), len(sizes), device)
    chunk = torch.arange(sum(counts), device=device)
    piece = torch.searchsorted(places[1], chunk, right=True)
    return torch.stack((piece, chunk - places[0].index_select(0, piece)), 1).int()


def on_device(numbers: array, columns: int, device: torch.device) -> Tensor:
    """A table of int64 (rows, columns), row by row; from an array, of which no number is an object
    by itself, in a third of the time that torch.tensor takes for a list."""
    if not numbers:
        return torch.empty(0, columns, dtype=torch.int64, device=device)
    return _move(torch.frombuffer(numbers, dtype=torch.int64).view(-1, columns), device)


def _move(table: Tensor, device: torch.device) -> Tensor:
    if capturing(device):
        result = torch.empty_like(table, device=device)
        torch.ops.shampoo_kernels_native.write_table_(result, table)
        return result
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)


def _check(stack: Tensor, pieces: list[Tensor], device: torch.device) -> None:
    common.check_dtype(_OP, "a stack", stack, common.FLOATS)
    if stack.ndim != 3:
        raise ValueError(f"{_OP}: a stack must be (b, m, n), got {tuple(stack.shape)}")
    if not stack.is_contiguous():
        raise ValueError(f"{_OP}: a stack must be contiguous, got strides {stack.stride()}")
    if not pieces:
        return
    common.check_dtype(_OP, "a piece", pieces[0], common.FLOATS)
    like, together = (pieces[0].dtype, stack.shape[1:], device), stack.device == device
    for piece in pieces:
        if not together or (piece.dtype, piece.shape, piece.device) != like:
            common.check_dtype(_OP, "a piece", piece, like[:1])
            common.check_shape(_OP, "a piece", piece, like[1], "as its place in a stack")
            raise ValueError(
                f"{_OP}: pieces and stacks must be on one device, got {piece.device} and "
                f"{stack.device} beside {device}"
            )


def _gather_(stack: Tensor, pieces: list[Tensor]) -> None:
    """The reference of pack_ for one stack: on a GPU a launch or two, whatever the strides."""
    if not pieces:
        return
    if stack.is_cpu:
        torch._foreach_copy_(list(stack.unbind()), pieces)
    elif stack.dtype == pieces[0].dtype:
        torch.stack(pieces, out=stack)
    else:
        stack.copy_(torch.stack(pieces))


def _apply_(pieces: list[Tensor], stack: Tensor, decay: Tensor, step: Tensor) -> None:
    """The reference of apply_ for one stack, without a synchronisation."""
    data = torch.stack(pieces)
    wide = torch.float64 in (data.dtype, stack.dtype)
    dtype = torch.float64 if wide else torch.float32
    kept = torch.where(decay == 0, 0, decay.to(dtype) * data.to(dtype))
    moved = kept + torch.where(step == 0, 0, step.to(dtype) * stack.to(dtype))
    result = torch.where((decay == 1) & (step == 0), data, moved.to(data.dtype))
    torch._foreach_copy_(pieces, result.unbind())
