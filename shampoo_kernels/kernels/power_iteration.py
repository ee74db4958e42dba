"""Block power iteration: A V by the product kernel, what lies between two of them in one launch.

Same start and estimate as ops/power_iteration.py. Its QR is a Gram matrix, eliminated with pivots
here: V <- W T, T upper triangular, spans what W spans. Up to 32 vectors cost about what one costs,
since reading A takes the time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shampoo_kernels.kernels.launch import Launch, divided, run
from shampoo_kernels.kernels.product import product
from shampoo_kernels.ops.power_iteration import start

MOST_VECTORS = 32  # with 64, the kernels between two products spill 700 bytes on sm_90
_CHUNK = 64
# A column whose square, off those before it, has fallen below this share is rounding, and becomes
# zero. Its singular value is then about 1/300 of the largest: too small to hold the first vector,
# which A stretches more than any other.
_LEAST_SHARE = tl.constexpr(1e-5)
_SQUARINGS = tl.constexpr(10)


def power_iteration(A: Tensor, steps: int, vectors: int) -> Tensor:
    """(B, n, n) float32, any strides -> (B,); vectors <= MOST_VECTORS; never synchronises."""
    batch, n, _ = A.shape
    if A.numel() == 0:
        return A.new_zeros(batch)
    largest = torch.linalg.vector_norm(A, torch.inf, (-2, -1))
    finite = largest.isfinite()
    usable = finite & (largest > 0)
    scale = torch.where(usable, largest, 1.0)
    lift, b = divided(scale)
    # A copy: entries below 2^-126, or of which the low parts are, would vanish in tensor cores.
    scaled = torch.empty(A.shape, dtype=torch.float32, device=A.device)
    product(None, None, scaled, op="power_iteration", b=torch.where(finite, b, 0.0), c=0.0, C=A,
            lift=lift)  # fmt: skip

    k = min(vectors, n)
    width = max(16, triton.next_power_of_2(k))
    W, V = torch.zeros(2, batch, n, width, dtype=torch.float32, device=A.device)
    W[:, :, :k] = start(n, k, A)
    _orthonormalize(W, V)
    for _ in range(steps):
        product(scaled, V, W, op="power_iteration")
        _orthonormalize(W, V)
    product(scaled, V, W, op="power_iteration")
    estimate = torch.empty(batch, dtype=torch.float32, device=A.device)
    meta = {"WIDTH": width, "CHUNK": _CHUNK, "num_warps": 4}
    run(estimate_kernel, Launch((batch,), (V, W, estimate, n), meta), A)
    return torch.where(finite, estimate * scale, torch.nan)


def _orthonormalize(W: Tensor, V: Tensor) -> None:
    batch, n, width = W.shape
    meta = {"WIDTH": width, "CHUNK": _CHUNK, "num_warps": width // 4}
    run(orthonormalize_kernel, Launch((batch,), (W, V, n), meta), W)


@triton.jit
def orthonormalize_kernel(W, V, n, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """V <- W T for one block (n, WIDTH), orthonormal as far as the rounding of WᵀW allows."""
    block = tl.program_id(0)
    G = _gram(W, block, n, WIDTH, CHUNK)
    T = _orthonormalizer(G, WIDTH)
    for step in range(tl.cdiv(n, CHUNK)):
        p, mask = _chunk(W, block, step, n, WIDTH, CHUNK)
        v = tl.dot(tl.load(p, mask=mask, other=0.0), T, input_precision="ieee")
        p, mask = _chunk(V, block, step, n, WIDTH, CHUNK)
        tl.store(p, v, mask=mask)


@triton.jit
def _orthonormalizer(G, WIDTH: tl.constexpr):
    """T with Tᵀ G T = I, but for zero columns: each column in turn is taken off those after it."""
    i, j = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    T, S = (i == j).to(tl.float32), G
    for pivot in range(WIDTH):
        on, first = (i == pivot) & (j == pivot), j == pivot
        square, original = tl.sum(tl.where(on, S, 0.0)), tl.sum(tl.where(on, G, 0.0))
        kept = (square > original * _LEAST_SHARE) & (original > 0)
        inverse = tl.where(kept, 1.0 / tl.where(kept, square, 1.0), 0.0)
        row = tl.sum(tl.where(i == pivot, S, 0.0), 0)
        along = tl.where(j > pivot, row[None, :] * inverse, 0.0)
        column = tl.sum(tl.where(first, T, 0.0), 1)[:, None]
        S -= tl.sum(tl.where(first, S, 0.0), 1)[:, None] * along
        T = tl.where(first, T * tl.sqrt(inverse), T - column * along)
    return T


@triton.jit
def estimate_kernel(V, W, estimate, n, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """‖W u‖ / ‖V u‖ for u near the first eigenvector of WᵀW, a column of its 1024th power."""
    block = tl.program_id(0)
    G, H = _gram(W, block, n, WIDTH, CHUNK), _gram(V, block, n, WIDTH, CHUNK)
    i, j = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    power = G
    for _ in range(_SQUARINGS):
        size = tl.max(tl.abs(power))
        power = power / tl.where(size > 0, size, 1.0)
        power = tl.dot(power, power, input_precision="ieee")
    diagonal = tl.sum(tl.where(i == j, power, 0.0), 0)
    u = tl.sum(tl.where(j == tl.argmax(diagonal, 0), power, 0.0), 1)
    u = u / tl.maximum(tl.max(tl.abs(u)), 1e-30)
    # u on both sides of each: as a row it is u where i == j, summed
    across = tl.sum(tl.where(i == j, u[:, None], 0.0), 0)
    outer = u[:, None] * across[None, :]
    above, below = tl.sum(outer * G), tl.sum(outer * H)
    tl.store(estimate + block, tl.sqrt(above / tl.where(below > 0, below, 1.0)))


@triton.jit
def _gram(W, block, n, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    G = tl.zeros((WIDTH, WIDTH), tl.float32)
    for step in range(tl.cdiv(n, CHUNK)):
        p, mask = _chunk(W, block, step, n, WIDTH, CHUNK)
        w = tl.load(p, mask=mask, other=0.0)
        G = tl.dot(tl.trans(w), w, G, input_precision="ieee")
    return G


@triton.jit
def _chunk(base, block, step, n, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    rows = step * CHUNK + tl.arange(0, CHUNK)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    offsets = (block.to(tl.int64) * n + rows) * WIDTH + columns
    return base + offsets, (rows < n) & (columns < WIDTH)
