"""A lower estimate of the largest eigenvalue by block power iteration."""

import torch
from torch import Tensor

from shampoo_kernels.chooser import choose_for
from shampoo_kernels.ops import common, small

_OP = "power_iteration"


def power_iteration(A: Tensor, steps: int = 10, vectors: int = 16) -> Tensor:
    """The largest |eigenvalue| of every block, estimated from below.

    `steps` times V <- orth(A V) from `vectors` start vectors that are the same on every device and
    in every call; then ‖A v‖ for the best v in the span of V. With 16 vectors and 10 steps it is
    typically within 1 % and, up to rounding, never above: where an upper bound is needed, use
    `eigenvalue_bound`.

    Args:
        A: (*, n, n) float32 or float64, symmetric; both triangles are read.
        steps: at least 1.
        vectors: at least 1; more than n act as n.

    Returns:
        (*,), dtype of A, the largest singular value (the largest eigenvalue, where A is positive
        semi-definite). 0 for a zero or empty block, NaN for a block that holds NaN or Inf; no
        block touches another.

    Raises:
        TypeError: another dtype or type; ValueError: another shape or value, or A requires grad.

    Source: Golub and Van Loan, Matrix Computations, section 8.2 (orthogonal iteration).
    """
    (A,) = common.as_tensors(_OP, A=A)
    straight = common.check_tensors(_OP, A=A)
    common.check_square(_OP, "A", A, batched=False)
    steps = common.check_integer(_OP, "steps", steps, least=1)
    vectors = common.check_integer(_OP, "vectors", vectors, least=1)
    op = _implementation if straight else torch.ops.shampoo_kernels.power_iteration
    return common.unstack(op(common.stack(A), steps, vectors), A.shape[:-2])


def power_iteration_ref(A: Tensor, steps: int, vectors: int) -> Tensor:
    """(B, n, n) -> (B,) by torch, without a synchronisation."""
    batch, n, _ = A.shape
    if A.numel() == 0:
        return A.new_zeros(batch)
    scale = A.abs().amax((-2, -1))
    finite = scale.isfinite()
    usable = finite & (scale > 0)
    A = torch.where(finite[:, None, None], A / torch.where(usable, scale, 1.0)[:, None, None], 0)
    V = _orthonormal(start(n, min(vectors, n), A).expand(batch, -1, -1))
    for _ in range(steps):
        W = A @ V
        V = _orthonormal(W)
    W = A @ V
    v = V @ _leading_vector(W.mT @ W)
    estimate = (A @ v).norm(dim=(-2, -1)) / v.norm(dim=(-2, -1))
    return estimate * scale  # NaN, or 0 * inf, where A is not finite


def _orthonormal(V: Tensor) -> Tensor:
    """Householder QR: columns that vanish or repeat are completed to a basis."""
    return torch.linalg.qr(V).Q


def start(n: int, vectors: int, like: Tensor) -> Tensor:
    """(n, vectors) numbers in (-1/2, 1/2): a hash of the index, in integers."""
    x = torch.arange(1, n * vectors + 1, device=like.device)
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return (x.to(like.dtype) / 2**32 - 0.5).view(n, vectors)


def _leading_vector(G: Tensor) -> Tensor:
    """(B, k, k) positive semi-definite -> (B, k, 1) near its first eigenvector, of G^1024."""
    tiny = torch.finfo(G.dtype).tiny
    for _ in range(10):
        G = G / G.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
        G = G @ G
    column = G.diagonal(dim1=-2, dim2=-1).argmax(-1)
    picked = G.gather(-1, column[:, None, None].expand(-1, G.shape[-1], 1))
    # A zero block has no direction: any unit vector serves.
    return torch.where(picked.abs().amax((-2, -1), keepdim=True) > 0, picked, 1.0)


def _check(A: Tensor, steps: int, vectors: int) -> None:
    common.check_dtype(_OP, "A", A, common.MASTERS)
    common.check_square(_OP, "A", A)
    for name, value in (("steps", steps), ("vectors", vectors)):
        if value < 1:
            raise ValueError(f"{_OP}: {name} must be at least 1, got {value}")


def _implementation(A: Tensor, steps: int, vectors: int) -> Tensor:
    _check(A, steps, vectors)
    backend = choose_for(_OP, A)
    if backend == "native" and A.numel() and (A.is_cpu or small.takes_power(A, vectors)):
        return torch.ops.shampoo_kernels_native.power_iteration(A, steps, vectors)
    if backend == "native":
        backend = choose_for(_OP, A, but="native")
    if backend == "triton":
        from shampoo_kernels.kernels import power_iteration as kernels

        if min(vectors, A.shape[-1]) <= kernels.MOST_VECTORS:
            return kernels.power_iteration(A, steps, vectors)
    return power_iteration_ref(A, steps, vectors)


def _fake(A: Tensor, steps: int, vectors: int) -> Tensor:
    _check(A, steps, vectors)
    return A.new_empty(A.shape[0])


common.register(
    "power_iteration(Tensor A, int steps, int vectors) -> Tensor", _implementation, _fake
)
