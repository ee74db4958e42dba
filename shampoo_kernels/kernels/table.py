"""Which tiles the product kernel runs with: rows keyed by op, arithmetic, n, k and target.

A row's `chosen` says which measurement chose it. Until then the numbers are derived from register
and shared-memory counts of compiled code and from waves on an H100. The tests compile every row.
Measured rows stand in tuned.py, which bench/tune.py writes, and come first.
"""

import functools
from typing import NamedTuple

import torch

from shampoo_kernels.kernels import tuned

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
    k: int = 1 << 31  # the longest sum that it serves
    split: int = 0  # a sum is cut into parts of at least so much where tiles are few; 0: never
    chosen: str = NOT_MEASURED


_SMALL, _LARGE = 2048, 1 << 31
# Bytes of shared memory a program may have; sm_80 stands for the smaller sm_86 and sm_120 too.
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
_PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}  # A100, H100, B200, MI300X
_SPLIT_K, _MOST_SPLITS = 1024, 8  # not measured yet
_OPS = {  # the modes that each op's operands come in, apart from "16-bit"
    "gram_ema_": ("tf32x3", "bf16x3", "bf16x6", "bf16", "tf32"),
    "newton": ("tf32x3", "bf16x3", "bf16x6"),
    "product": ("tf32x3", "tf32"),
    "precondition": ("tf32x3", "bf16x3", "bf16"),
    "power_iteration": ("tf32x3", "bf16x6"),
}


def _rows(op: str, fp32: tuple[str, ...]) -> tuple[Row, ...]:
    once = tuple(mode for mode in ("bf16", "tf32") if mode in fp32)
    split = tuple(mode for mode in fp32 if mode not in once)  # into three or six products
    rows: tuple[Row, ...] = (
        Row("sm_90", op, ("16-bit",), _SMALL, "descriptor", 64, 64, 4, 4),
        Row("sm_90", op, ("16-bit",), _LARGE, "descriptor", 128, 64, 8, 4),
        Row("sm_90", op, fp32, _SMALL, "descriptor", 64, 32, 4, 4),
        Row("sm_90", op, fp32, _LARGE, "descriptor", 128, 32, 8, 3),
        Row("gfx942", op, ("16-bit", *_HIP, "ieee"), _LARGE, "pointer", 64, 32, 4, 2),
    )
    # Pointer rows serve odd strides, whose loads are narrow and pass through registers: there tiles
    # of 64 x 64 on four warps spill up to 96 bytes, 128 x 128 on eight up to 768. The stages are
    # those with which nothing spills for odd and aligned strides, as they are and transposed.
    # ieee, which no word stands for, has no tensor cores: large tiles would only unroll.
    parts = (64, 2) if op in ("newton", "power_iteration") else (32, 3)
    for target, stages, split_k, split_stages in (
        ("sm_90", 2, 32, 3), ("sm_80", 3, 32, 2), ("sm_100", 2, *parts),
    ):  # fmt: skip
        rows += (
            Row(target, op, ("16-bit",), _LARGE, "pointer", 64, 64, 8, 3),
            Row(target, op, once, _LARGE, "pointer", 64, 64, 8, stages),
            Row(target, op, split, _LARGE, "pointer", 64, split_k, 8, split_stages),
            Row(target, op, ("ieee",), _LARGE, "pointer", 32, 32, 4, 3 if target == "sm_80" else 2),
        )
    if op in ("newton", "power_iteration"):  # all of their matrices are float32
        rows = tuple(row for row in rows if row.modes != ("16-bit",))
    rows = tuple(row for row in rows if row.modes)
    return tuple(row._replace(split=_SPLIT_K) for row in rows) if op == "gram_ema_" else rows


ROWS = (
    *(Row(*row) for row in tuned.ROWS),
    *(row for op, fp32 in _OPS.items() for row in _rows(op, fp32)),
)


def mode(A: torch.dtype, B: torch.dtype, precision: str, target: str) -> str:
    """The mode in which operands of these dtypes are multiplied; precision: a word or a mode."""
    if A == B and A.itemsize == 2:
        return "16-bit"
    return WORDS["hip" if target.startswith("gfx") else "cuda"].get(precision, precision)


def select(target: str, op: str, mode: str, n: int, k: int, descriptors: bool) -> Row:
    """The first row that serves a call with outputs of at most n rows and columns and sums of k
    products; descriptors says whether the strides allow them.

    Raises LookupError where there is none.
    """
    for form in ("descriptor", "pointer") if descriptors else ("pointer",):
        for row in ROWS:
            serves = (row.target, row.op, row.form) == (target, op, form)
            if serves and mode in row.modes and n <= row.n and k <= row.k:
                return row
    raise LookupError(f"no row for {op} with mode {mode!r} on {target}")


def splits(row: Row, batch: int, n: int, k: int) -> int:
    """Into how many parts a sum over k is cut where the triangles of `batch` outputs (n, n) have
    too few tiles for the processors: a function of the row and the shape alone, so that the same
    call gives the same bits in every run."""
    down, parts = -(-n // row.block), 1
    programs = batch * down * (down + 1) // 2
    while (
        row.split > 0
        and parts < _MOST_SPLITS
        and 0 < 2 * parts * programs <= _PROCESSORS[row.target]
        and k % (2 * parts * row.block_k) == 0
        and k // (2 * parts) >= row.split
    ):
        parts *= 2
    return parts


def shared_bytes(row: Row, mode: str) -> int:
    """At least the shared memory that the product kernel needs with this row: the stages of both
    operands, or a tile of the result on its way out, and a little for barriers."""
    size = 2 if mode == "16-bit" else 4
    stages = row.stages * 2 * row.block * row.block_k * size
    return max(stages, 4 * row.block * (row.block + 4)) + 1024


@functools.cache
def target(device: torch.device) -> str:
    """The target whose rows serve this device; no synchronisation."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx942"
    # sm_120 has mma.sync and 99 KB as sm_86 has, neither wgmma nor tcgen05.
    return {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80")
