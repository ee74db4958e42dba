"""From the arguments of a product to the launch of its kernel: row of the table, form, strides."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from shampoo_kernels.kernels import table

Factor = float | Tensor
_GROUP = 8  # tile rows a band: bfloat16 operands of 8 + 16 tiles of 128 x 8192 are 48 MB, an L2
_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Launch(NamedTuple):
    """A launch that is ready: `kernel[grid](*arguments, **meta)`."""

    grid: tuple[int]
    arguments: tuple
    meta: dict


def prepare(
    A: Tensor | None, B: Tensor | None, D: Tensor, *, op: str, a: Factor, b: Factor, c: Factor,
    C: Tensor | None, D16: Tensor | None, scale16: float, symmetric: bool, measure: str | None,
    precision: str, lift: Tensor | None = None,
) -> Launch | None:  # fmt: skip
    """The launch, or None where D is empty."""
    D, C, D16 = _stack(D), C if C is None else _stack(C), D16 if D16 is None else _stack(D16)
    A, B = (D[..., :0], D[..., :0, :]) if A is None or B is None else (_stack(A), _stack(B))
    outer, blocks, m, n = D.shape
    if D.numel() == 0:
        return None
    target = table.target(D.device)
    mode = table.mode(A.dtype, B.dtype, precision, target)
    plans = [_Plan.of(x) for x in (A, B, C, D, D16)]
    descriptors = all(plan.aligned for plan in plans) and not any(p.turned for p in plans[2:])
    row = table.select(target, op, mode, max(m, n), A.shape[-1], descriptors)
    descriptors = row.form == "descriptor"
    operand, dot = table.MODES[mode]
    shapes = ((row.block, row.block_k), (row.block_k, row.block), *[(row.block, row.block)] * 3)
    tensors = [
        plan.descriptor(shape) if descriptors else plan.tensor
        for plan, shape in zip(plans, shapes, strict=True)
    ]
    down, across = triton.cdiv(m, row.block), triton.cdiv(n, row.block)
    tiles = down * (down + 1) // 2 if symmetric else down * across
    measured = None
    if measure is not None:
        measured = torch.empty(outer * blocks, tiles, dtype=torch.float32, device=D.device)
    strides = [None if plan.tensor is None else plan.tensor.stride() for plan in plans]
    arguments = (
        *tensors, measured, m, n, A.shape[-1], blocks, *strides,
        *(x if isinstance(x, Tensor) else float(x) for x in (a, b, c)), scale16, lift,
    )  # fmt: skip
    meta = {
        "a_stride": factor_stride(a), "b_stride": factor_stride(b), "c_stride": factor_stride(c),
        "A_TRANSPOSED": descriptors and plans[0].turned,
        "B_TRANSPOSED": descriptors and plans[1].turned,
        "DESCRIPTORS": descriptors, "SYMMETRIC": symmetric, "MEASURE": measure,
        "OPERAND": _TRITON[operand or A.dtype], "PRECISION": dot,
        "BLOCK_M": row.block, "BLOCK_N": row.block, "BLOCK_K": row.block_k, "GROUP": _GROUP,
        "num_warps": row.warps, "num_stages": row.stages,
    }  # fmt: skip
    return Launch((outer * blocks * tiles,), arguments, meta)


def divided(scale: Tensor) -> tuple[Tensor, Tensor]:
    """(lift, b) with b * lift = 1 / scale for scale (B,) > 0: where 1 / scale, or a multiple of
    scale, is no float32, lift is a power of two, else 1."""
    lift = torch.where(scale < 2.0**-100, 2.0**100, torch.where(scale > 2.0**100, 2.0**-100, 1.0))
    lift = lift.to(torch.float32)
    return lift, 1 / (scale * lift)


def run(kernel, launch: Launch, on: Tensor) -> None:
    with torch.cuda.device_of(on):  # triton launches on the current device
        kernel[launch.grid](*launch.arguments, **launch.meta)


class _Plan(NamedTuple):
    """A tensor (O, B, m, n), and whether a TMA descriptor can describe it or its transpose."""

    tensor: Tensor | None
    aligned: bool
    turned: bool

    @classmethod
    def of(cls, x: Tensor | None) -> "_Plan":
        if x is None:
            return cls(None, True, False)
        turned = x.stride(-1) != 1 and x.stride(-2) == 1
        view = x.mT if turned else x
        aligned = (
            x.numel() > 0
            and view.stride(-1) == 1
            and x.data_ptr() % 16 == 0
            and all(s * x.element_size() % 16 == 0 and s > 0 for s in _strides(view)[:-1])
        )
        return cls(x, aligned, turned)

    def descriptor(self, block: tuple[int, int]) -> TensorDescriptor | None:
        if self.tensor is None:
            return None
        view = self.tensor.mT if self.turned else self.tensor
        block = block[::-1] if self.turned else block
        return TensorDescriptor(view, list(view.shape), _strides(view), [1, 1, *block])


def _strides(x: Tensor) -> list[int]:
    """Its strides; where a dimension has size 1 and they mean nothing, the next aligned ones."""
    strides = [x.stride(-1)]
    for size, stride, inner in zip(
        x.shape[-2::-1], x.stride()[-2::-1], x.shape[:0:-1], strict=True
    ):
        strides.append(-(-strides[-1] * inner // 16) * 16 if size == 1 else stride)
    return strides[::-1]


def _stack(x: Tensor) -> Tensor:
    return x if x.ndim == 4 else x.unsqueeze(0)


def factor_stride(x: Factor) -> int | None:
    """What the kernels step by to the factor of the next block; None for a float."""
    return (0 if x.numel() == 1 else x.stride(0)) if isinstance(x, Tensor) else None
