"""Which tiles the product kernel runs with: rows keyed by op, arithmetic, size and target.

A row's `chosen` says which measurement chose it. Until then the numbers are derived from register
and shared-memory counts of compiled code and from waves on an H100. The tests compile every row.
"""

import functools
from typing import NamedTuple

import torch

NOT_MEASURED = "not measured yet"

# What a mode feeds to tl.dot, and its input_precision. Operands that are 16-bit in memory, both in
# the same dtype, are multiplied exactly in mode "16-bit" at every precision.
MODES = {
    "16-bit": (None, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "ieee": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
    "bf16x3": (torch.float32, "bf16x3"),
    "bf16x6": (torch.float32, "bf16x6"),
}
# float32 operands never meet plain tf32 through a word: only through its own name.
WORDS = {
    "cuda": {"highest": "tf32x3", "high": "bf16x3", "medium": "bf16"},
    "hip": {"highest": "bf16x6", "high": "bf16x3", "medium": "bf16"},
}
_HIP = tuple(WORDS["hip"].values())


class Row(NamedTuple):
    target: str  # sm_80 stands for every NVIDIA GPU with mma.sync and 99 KB of shared memory
    op: str
    modes: tuple[str, ...]
    n: int  # the largest side of the output that it serves
    form: str  # "descriptor" (TMA: aligned strides) or "pointer" (any strides)
    block: int  # tiles of the output are square
    block_k: int
    warps: int
    stages: int
    chosen: str = NOT_MEASURED


_SMALL, _LARGE = 2048, 1 << 31
_OPS = {  # the modes that each op's operands come in, apart from "16-bit"
    "gram_ema_": ("tf32x3", "bf16x3", "bf16x6", "bf16", "tf32"),
    "newton": ("tf32x3", "bf16x3", "bf16x6"),
    "product": ("tf32x3", "tf32"),
    "precondition": ("tf32x3", "bf16x3", "bf16"),
    "power_iteration": ("tf32x3", "bf16x6"),
}


def _rows(op: str, fp32: tuple[str, ...]) -> tuple[Row, ...]:
    narrow = 32 if op == "power_iteration" else 64  # few columns, and 64 spills registers
    rows: tuple[Row, ...] = (
        Row("sm_90", op, ("16-bit",), _SMALL, "descriptor", 64, 64, 4, 4),
        Row("sm_90", op, ("16-bit",), _LARGE, "descriptor", 128, 64, 8, 4),
        Row("sm_90", op, ("16-bit",), _SMALL, "pointer", 64, 32, 4, 4),
        Row("sm_90", op, ("16-bit",), _LARGE, "pointer", 128, 64, 8, 3),
        Row("sm_90", op, fp32, _SMALL, "descriptor", 64, 32, 4, 4),
        Row("sm_90", op, fp32, _LARGE, "descriptor", 128, 32, 8, 3),
        Row("sm_90", op, (*fp32, "ieee"), _LARGE, "pointer", 64, 32, 4, 3),
        Row("sm_80", op, ("16-bit",), _LARGE, "pointer", 64, 32, 4, 4),
        Row("sm_80", op, (*fp32, "ieee"), _LARGE, "pointer", narrow, 32, 4, 2),
        Row("sm_100", op, ("16-bit", *fp32, "ieee"), _LARGE, "pointer", 64, 32, 4, 3),
        Row("gfx942", op, ("16-bit", *_HIP, "ieee"), _LARGE, "pointer", 64, 32, 4, 2),
    )
    if op in ("newton", "power_iteration"):  # all of their matrices are float32
        rows = tuple(row for row in rows if row.modes != ("16-bit",))
    return rows


ROWS = tuple(row for op, fp32 in _OPS.items() for row in _rows(op, fp32))


def mode(A: torch.dtype, B: torch.dtype, precision: str, target: str) -> str:
    """The mode in which operands of these dtypes are multiplied; precision: a word or a mode."""
    if A == B and A.itemsize == 2:
        return "16-bit"
    return WORDS["hip" if target.startswith("gfx") else "cuda"].get(precision, precision)


def select(target: str, op: str, mode: str, n: int, descriptors: bool) -> Row:
    """The first row that serves the call; descriptors says whether the strides allow them.

    Raises LookupError where there is none.
    """
    for form in ("descriptor", "pointer") if descriptors else ("pointer",):
        for row in ROWS:
            serves = (row.target, row.op, row.form) == (target, op, form)
            if serves and mode in row.modes and n <= row.n:
                return row
    raise LookupError(f"no row for {op} with mode {mode!r} on {target}")


@functools.cache
def target(device: torch.device) -> str:
    """The target whose rows serve this device; no synchronisation."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx942"
    # sm_120 has mma.sync and 99 KB as sm_86 has, neither wgmma nor tcgen05.
    return {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80")
