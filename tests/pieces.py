"""Pieces of tensors in every layout, stacks for them, and pack.cu in emulation on a copy of the
memory that their table leads to."""

import ctypes
import itertools
import math

import emulation
import torch
from torch import Tensor

from shampoo_kernels.ops.pack import Pieces

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAN = math.nan


def layouts(x: Tensor):
    """x (m, n) contiguous, transposed, inside of a larger matrix, with steps, shifted by one."""
    m, n = x.shape
    yield x.clone()
    yield x.mT.contiguous().mT
    for rows, columns in ((slice(1, m + 1), slice(3, n + 3)), (slice(m), slice(1, 2 * n + 1, 2))):
        frame = torch.full((m + 3, 2 * n + 5), NAN, dtype=x.dtype)
        frame[rows, columns] = x
        yield frame[rows, columns]
    yield torch.empty(m * n + 1, dtype=x.dtype)[1:].view(m, n).copy_(x)


def stacks_for(data):
    """Stacks of 1 to 3 for neighbours that are alike, full of NaN: float32, or of any dtype."""
    stacks = []
    for (shape, _), group in itertools.groupby(data, lambda x: (x.shape, x.dtype)):
        left = len(list(group))
        while left:
            size, kind = min(left, 1 + len(stacks) % 3), FLOATS[len(stacks) // 2 % 4]
            dtype = torch.float32 if len(stacks) % 2 else kind
            stacks.append(torch.full((size, *shape), NAN, dtype=dtype))
            left -= size
    return stacks


def places(stacks):
    return [place for stack in stacks for place in stack]


def span(x: Tensor) -> tuple[int, int]:
    """The address of the first element, and the bytes from there to the last one's end."""
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), (steps + 1) * x.element_size() if x.numel() else 0


class Memory:
    """Copies of spans of memory, end to end, each at the same distance from a multiple of 16."""

    def __init__(self, spans: list[tuple[int, int]]):
        merged: list[tuple[int, int]] = []  # [start, stop)
        for start, size in sorted(spans):
            if merged and start < merged[-1][1]:
                start, stop = merged[-1][0], max(merged.pop()[1], start + size)
            else:
                stop = start + size
            if stop > start:
                merged.append((start, stop))
        self.size, self.parts = 0, []  # (address, bytes, offset)
        for start, stop in merged:
            offset = -(-self.size // 16) * 16 + start % 16
            self.parts.append((start, stop - start, offset))
            self.size = offset + stop - start

    def offset(self, address: int) -> int:
        """Where the copy of this address is; -1 for none."""
        for start, size, offset in self.parts:
            if start <= address < start + size:
                return offset + address - start
        return -1

    def read(self) -> bytes:
        copy = bytearray(self.size)
        for start, size, offset in self.parts:
            copy[offset : offset + size] = ctypes.string_at(start, size)
        return bytes(copy)

    def write(self, copy: Tensor) -> None:
        """What a program made of the copy, (bytes,) uint8, back to where it came from."""
        raw = copy.numpy().tobytes()
        for start, size, offset in self.parts:
            ctypes.memmove(start, raw[offset : offset + size], size)


class Emulated:
    """pack.cu on a copy of the memory of all pieces."""

    def __init__(self, program, data, stacks):
        self.program, self.pieces = program, Pieces(data, stacks)
        self.memory = Memory([span(x) for x in (*data, *places(stacks))])
        self.table, self.chunks = self.pieces.table[0].clone(), self.pieces.table[1]
        for row in self.table:
            row[:2] = torch.tensor([self.memory.offset(int(address)) for address in row[:2]])

    def run(self, mode, flag, *factors):
        dtype = factors[0].dtype if factors else torch.float32
        sizes = mode, flag, self.memory.size, len(self.table), len(self.chunks)
        raw = self.memory.read() + emulation.raw(self.table, self.chunks, *factors)
        shapes = (torch.uint8, (self.memory.size,)), (torch.float64, (len(self.table),))
        copy, *squares = emulation.call(self.program, dtype, sizes, raw, *shapes[: 1 + (mode == 2)])
        self.memory.write(copy)
        return squares

    def pack_(self):
        self.run(0, False)

    def unpack_(self):
        self.run(1, False)

    def apply_(self, decay, step):
        self.run(1, True, decay, step)

    def pack_finite_(self, negate=False):
        return self.run(2, negate)[0]
