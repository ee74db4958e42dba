"""Pieces of many tensors, packed into stacks and updated from them in one call; not a public op.

What an optimizer does around its kernels: gather the blocks of all gradients, whatever their dtypes
and strides, and apply the preconditioned blocks to the weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_kernels.chooser import choose_for
from shampoo_kernels.ops import common

_OP = "pack"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # kernels.h
_CHUNK = 8192  # kChunkElements of kernels.h
# Elements of a mean piece from which plain copies on a CPU are torch's: one call for all pieces
# saves nothing any more, and torch rounds to 16 bits faster. On one Zen 5 core torch is 1.0 to 1.3
# times as fast in float32, from bfloat16 1.0 to 1.2, to bfloat16 1.4 to 2.4; below, native is 1.0
# to 2.6 times (2026-11-25).
_LARGE_PACKED, _LARGE_UNPACKED = 1 << 15, 1 << 14


class Pieces:
    """Views `data[i]` (m, n), any float dtype and strides, and their places `packed[i]` (m, n),
    contiguous, any float dtype: for example the blocks of gradients and the views of a stack.

    All on one device. The table of pointers is made once and reaches the device without a
    synchronisation; it holds for as long as the tensors keep their memory, which this object keeps
    alive. No piece may overlap another or a packed one.

    Raises:
        TypeError: a dtype that is not float64, float32, bfloat16 or float16; ValueError: shapes
        that differ, a packed piece that is not contiguous, tensors of several devices.
    """

    def __init__(self, data: Sequence[Tensor], packed: Sequence[Tensor]):
        if len(data) != len(packed):
            raise ValueError(f"{_OP}: got {len(data)} pieces and {len(packed)} places for them")
        self.data, self.packed = list(data), list(packed)
        for piece, place in zip(self.data, self.packed, strict=True):
            self._check(piece, place)
        wide = any(t.dtype == torch.float64 for t in (*self.data, *self.packed))
        self.factor_dtype = torch.float64 if wide else torch.float32
        self._elements = sum(piece.numel() for piece in self.data)
        self._table: tuple[Tensor, Tensor] | None = None

    def _check(self, piece: Tensor, place: Tensor) -> None:
        common.check_dtype(_OP, "a piece", piece, common.FLOATS)
        common.check_dtype(_OP, "a packed piece", place, common.FLOATS)
        if piece.ndim != 2:
            raise ValueError(f"{_OP}: a piece must be (m, n), got {tuple(piece.shape)}")
        common.check_shape(_OP, "a packed piece", place, tuple(piece.shape), "as its piece")
        if not place.is_contiguous():
            raise ValueError(f"{_OP}: a packed piece must be contiguous, got {place.stride()}")
        common.check_same_device(_OP, self.data[0], piece=piece, packed=place)

    @property
    def table(self) -> tuple[Tensor, Tensor]:
        """Piece and PieceChunk of kernels.h: int64 (pieces, 8), int32 (chunks, 2)."""
        if self._table is None:
            rows = [
                (piece.data_ptr(), place.data_ptr(), *piece.shape, *piece.stride(),
                 _DTYPES[piece.dtype], _DTYPES[place.dtype])
                for piece, place in zip(self.data, self.packed, strict=True)
            ]  # fmt: skip
            counts = torch.tensor([-(-piece.numel() // _CHUNK) for piece in self.data])
            piece = torch.arange(len(rows)).repeat_interleave(counts)
            chunk = torch.arange(len(piece)) - (counts.cumsum(0) - counts)[piece]
            device = self.data[0].device if self.data else torch.device("cpu")
            self._table = (
                _move(torch.tensor(rows, dtype=torch.int64).view(-1, 8), device),
                _move(torch.stack([piece, chunk], 1).int(), device),
            )
        return self._table

    def pack_(self) -> None:
        """packed[i] <- data[i], cast."""
        if self._native() and not self._large(_LARGE_PACKED):
            torch.ops.shampoo_kernels_native.pack_(*self.table)
        elif self.data:
            torch._foreach_copy_(self.packed, self.data)

    def unpack_(self) -> None:
        """data[i] <- packed[i], cast."""
        if self._native() and not self._large(_LARGE_UNPACKED):
            torch.ops.shampoo_kernels_native.unpack_apply_(*self.table, None, None)
        elif self.data:
            torch._foreach_copy_(self.data, self.packed)

    def apply_(self, decay: Tensor, step: Tensor) -> None:
        """data[i] <- decay[i] * data[i] + step[i] * packed[i].

        In float32, or float64 where one of the two is, rounded once to the dtype of the piece. For
        W <- (1 - lr wd) W - lr s U: decay = 1 - lr wd, step = -lr s. decay[i] = 0 does not read
        data[i], step[i] = 0 does not read packed[i]; with decay[i] = 1 too data[i] keeps its bits.

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
        for i, (piece, place) in enumerate(zip(self.data, self.packed, strict=True)):
            piece.copy_(_combined(decay[i], piece, step[i], place))

    def _native(self) -> bool:
        return bool(self.data) and choose_for(_OP, self.data[0], torch.float32) == "native"

    def _large(self, elements: int) -> bool:
        return self.data[0].is_cpu and self._elements >= elements * len(self.data)


def _combined(decay: Tensor, piece: Tensor, step: Tensor, place: Tensor) -> Tensor:
    """The reference of apply_ for one piece, without a synchronisation."""
    wide = torch.float64 in (piece.dtype, place.dtype)
    dtype = torch.float64 if wide else torch.float32
    kept = torch.where(decay == 0, 0, decay.to(dtype) * piece.to(dtype))
    moved = kept + torch.where(step == 0, 0, step.to(dtype) * place.to(dtype))
    return torch.where((decay == 1) & (step == 0), piece, moved.to(piece.dtype))


def _move(table: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)
