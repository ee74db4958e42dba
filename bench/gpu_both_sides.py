"""An experiment, rows of gpu_bench.py: G Gᵀ and Gᵀ G from one read of G, in one launch.

The tiles of both sides of a block follow each other, so that the second side finds G in the L2. By
counting, a stack of bfloat16 blocks saves one read of G, 2 of 16 bytes an entry, and a launch. Not
in the package unless a measurement says that it pays.
"""

from collections.abc import Callable

import gpu_matrices
import torch
import triton
import triton.language as tl
from gpu_matrices import BFLOAT16, relative
from gpu_timing import copies, milliseconds
from torch import Tensor

from shampoo_kernels import gram_ema_
from shampoo_kernels.kernels import table
from shampoo_kernels.kernels.launch import _GROUP, _TRITON, Launch, _Plan, _stack, run
from shampoo_kernels.kernels.product import _dot, _load, _store
from shampoo_kernels.kernels.tiles import triangle


def both_sides_(left: Tensor, right: Tensor, G: Tensor, beta: float, alpha: float) -> None:
    """left (B, m, m) <- beta*left + alpha*G Gᵀ, right (B, n, n) <- beta*right + alpha*Gᵀ G for G
    (B, m, n) bfloat16 or float16; strides that a descriptor can describe."""
    run(both_sides_kernel, prepare(left, right, G, beta, alpha), G)


def prepare(left: Tensor, right: Tensor, G: Tensor, beta: float, alpha: float) -> Launch:
    batch, m, n = G.shape
    row = table.select(table.target(G.device), "gram_ema_", "16-bit", max(m, n), max(m, n), True)
    assert row.form == "descriptor", row
    square = (row.block, row.block)
    shapes = ((row.block, row.block_k), (row.block_k, row.block), square, square)
    plans = [_Plan.of(_stack(x)) for x in (G, G, left, right)]
    assert all(plan.aligned and not plan.turned for plan in plans)
    down, across = triton.cdiv(m, row.block), triton.cdiv(n, row.block)
    tiles = down * (down + 1) // 2 + across * (across + 1) // 2
    descriptors = (plan.descriptor(shape) for plan, shape in zip(plans, shapes, strict=True))
    meta = {"BLOCK": row.block, "BLOCK_K": row.block_k, "GROUP": _GROUP,
            "OPERAND": _TRITON[G.dtype], "num_warps": row.warps,
            "num_stages": row.stages}  # fmt: skip
    return Launch((batch * tiles,), (*descriptors, m, n, float(beta), float(alpha)), meta)


@triton.jit
def both_sides_kernel(
    wide, tall, left, right,  # descriptors of G, G, and the statistics
    m, n, beta, alpha,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One tile of one side, and its mirror image, as in the product kernel."""
    down, across = tl.cdiv(m, BLOCK), tl.cdiv(n, BLOCK)
    lefts, rights = down * (down + 1) // 2, across * (across + 1) // 2
    block, tile = tl.program_id(0) // (lefts + rights), tl.program_id(0) % (lefts + rights)
    if tile < lefts:
        _side(wide, left, block, tile, down, m, n, beta, alpha, False,
              BLOCK, BLOCK_K, GROUP, OPERAND)  # fmt: skip
    else:
        _side(tall, right, block, tile - lefts, across, n, m, beta, alpha, True,
              BLOCK, BLOCK_K, GROUP, OPERAND)  # fmt: skip


@triton.jit
def _side(
    G, stat, block, tile, tiles, n, k, beta, alpha, TURNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """stat <- beta*stat + alpha * A Aᵀ for A (n, k) = G, or TURNED Gᵀ."""
    row, column = triangle(tile, tiles, GROUP)
    row, column = row * BLOCK, column * BLOCK
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(tl.cdiv(k, BLOCK_K)):
        x = _load(G, 0, block, row, step * BLOCK_K, n, k, None, BLOCK, BLOCK_K, TURNED, True)
        y = _load(G, 0, block, step * BLOCK_K, column, k, n, None, BLOCK_K, BLOCK, not TURNED, True)
        acc = _dot(x.to(OPERAND), y.to(OPERAND), acc, "ieee")
    out = alpha * acc
    if beta != 0:
        out += beta * _load(stat, 0, block, row, column, n, n, None, BLOCK, BLOCK, False, True)
    mirrored = tl.trans(out)
    i, j = row + tl.arange(0, BLOCK)[:, None], column + tl.arange(0, BLOCK)[None, :]
    out = tl.where(i >= j, out, mirrored)
    _store(stat, out, 0, block, row, column, n, n, None, BLOCK, BLOCK, True)
    if row != column:
        _store(stat, mirrored, 0, block, column, row, n, n, None, BLOCK, BLOCK, True)


def bench_both_sides(batch: int, m: int, n: int, rate: dict[str, float]) -> dict:
    """Ours is one launch a side; the floor reads G once."""
    moved = batch * (2 * m * n + 6 * (m * m + n * n))
    G = [torch.randn(batch, m, n, device=gpu_matrices.DEVICE).to(BFLOAT16) for _ in copies(moved)]
    S = [[torch.zeros(batch, k, k, device=gpu_matrices.DEVICE) for k in (m, n)] for _ in G]

    def two_(left: Tensor, right: Tensor, g: Tensor) -> None:
        gram_ema_(left, g, 0.95, 0.05, side="left")
        gram_ema_(right, g, 0.95, 0.05, side="right")

    def one_(left: Tensor, right: Tensor, g: Tensor) -> None:
        both_sides_(left, right, g, 0.95, 0.05)

    found = milliseconds({
        name: [lambda s=s, g=g, call=call: call(*s, g) for s, g in zip(S, G, strict=True)]
        for name, call in (("ours", two_), ("both sides in one launch", one_))
    })  # fmt: skip
    exact, errors = G[0][:1].double().mT @ G[0][:1].double(), {}
    for name, call in (("ours", two_), ("both sides in one launch", one_)):
        left, right = (torch.zeros_like(s[:1]) for s in S[0])
        call(left, right, G[0][:1])
        errors[name] = relative(right, 0.05 * exact).max().item()
    flops = batch * m * n * (m + n + 256.0)
    floor = max(flops / rate["bf16 TFLOP/s"] / 1e9, moved / rate["copy GB/s"] / 1e6)
    return {"case": f"both sides of {batch} x {m} x {n}, bfloat16", "milliseconds": found,
            "floor": floor, "error": errors.pop("ours"), "errors": errors}  # fmt: skip


def jobs() -> list[tuple[Callable[..., dict], tuple]]:
    return [(bench_both_sides, size) for size in ((64, 512, 512), (64, 1024, 1024),
                                                  (16, 1024, 4096), (1, 4096, 4096))]  # fmt: skip
