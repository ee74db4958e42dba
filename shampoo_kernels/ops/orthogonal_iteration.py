"""Orthogonal iteration: an eigenbasis kept up to date by products and a QR decomposition."""

import torch
from torch import Tensor

from shampoo_kernels import native
from shampoo_kernels.chooser import choose_for
from shampoo_kernels.ops import common, small
from shampoo_kernels.ops.product import product

_OP = "orthogonal_iteration"
_MOST_N = 256


def orthogonal_iteration(A: Tensor, Q: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    """`steps` times Q <- orth((A + lift*I) Q), the QR step of SOAP-type optimizers.

    The lift, max(1e-8, min(64*n*eps, 1/8)) times the largest |eigenvalue estimate|, keeps the null
    space of a rank-deficient A where Q has it, and the columns' signs are fixed by diag(R) >= 0:
    columns move continuously, in their order, and are not sorted.

    Args:
        A: (*, n, n) float32 or float64, symmetric; both triangles are read.
        Q: (*, n, n), dtype of A, with orthonormal columns; not changed.
        steps: at least 1.

    Returns:
        (eigenvalues, Q): (*, n), the diagonal of QᵀAQ with the *new* Q, and (*, n, n). A zero block
        gives zeros and its Q (to rounding). A block where A, Q or A Q is not finite gives NaN and
        its Q as it was; no block touches another.

    Raises:
        TypeError: another dtype or type; ValueError: another shape or value, or a tensor that
        requires grad.

    Sources: Golub and Van Loan, Matrix Computations, section 8.2; SOAP (arXiv 2409.11321).
    """
    A, Q = common.as_tensors(_OP, A=A, Q=Q)
    straight = common.check_tensors(_OP, A=A, Q=Q)
    common.check_square(_OP, "A", A, batched=False)
    common.check_shape(_OP, "Q", Q, tuple(A.shape), "as A")
    steps = common.check_integer(_OP, "steps", steps, least=1)
    op = _implementation if straight else torch.ops.shampoo_kernels.orthogonal_iteration
    eigenvalues, new = op(common.stack(A), common.stack(Q), steps)
    return common.unstack(eigenvalues, A.shape[:-1]), common.unstack(new, A.shape)


def _iterate(A: Tensor, Q: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """(B, n, n), (B, n, n) -> (B, n), (B, n, n)."""
    if A.numel() == 0:
        return A.new_empty(A.shape[:-1]), Q.clone()
    backend = choose_for(_OP, A)
    lift = max(1e-8, min(64 * A.shape[-1] * torch.finfo(A.dtype).eps, 0.125))
    if backend == "native" and (_by_blocks(A) or small.takes_basis(A)):
        eigenvalues, new = A.new_empty(A.shape[:-1]), A.new_empty(A.shape)
        torch.ops.shampoo_kernels_native.orthogonal_iteration_(A, Q, lift, steps, eigenvalues, new)
        return eigenvalues, new
    Z = product(A, Q, backend=backend)
    for _ in range(steps):
        largest = torch.linalg.vecdot(Q, Z, dim=-2).abs().amax(-1)[:, None, None]
        Q = _orthonormal_(Z.addcmul_(largest, Q, value=lift), Q)
        Z = product(A, Q, out=Z, backend=backend)
    eigenvalues = torch.linalg.vecdot(Q, Z, dim=-2)
    finite = Z.isfinite().flatten(1).all(1) & eigenvalues.isfinite().all(1)
    return torch.where(finite[:, None], eigenvalues, torch.nan), Q


def _by_blocks(A: Tensor) -> bool:
    """On a CPU, LAPACK's QR of a block on one thread, for n where one block is no work for all."""
    fits = A.is_cpu and A.shape[-1] <= _MOST_N
    return fits and native.lib is not None and native.lib.has_qr()


def _orthonormal_(Z: Tensor, Q: Tensor) -> Tensor:
    """The Q factor of every Z with diag(R) >= 0; Q where Z is zero or not finite. Z is used up."""
    size = torch.linalg.vector_norm(Z, torch.inf, dim=(-2, -1), keepdim=True)
    usable = (size > 0) & size.isfinite()
    # Scaled, so that no norm of a column overflows; LAPACK never sees a number that is not finite.
    Z.div_(torch.where(usable, size, 1.0)).masked_fill_(~usable, 0.0)
    new, R = torch.linalg.qr(Z)
    new.mul_(torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2))
    return torch.where(usable, new, Q)


def _check(A: Tensor, Q: Tensor, steps: int) -> None:
    common.check_dtype(_OP, "A", A, common.MASTERS)
    common.check_square(_OP, "A", A)
    common.check_dtype(_OP, "Q", Q, (A.dtype,))
    common.check_shape(_OP, "Q", Q, tuple(A.shape), "as A")
    common.check_same_device(_OP, A, Q=Q)
    if steps < 1:
        raise ValueError(f"{_OP}: steps must be at least 1, got {steps}")


def _implementation(A: Tensor, Q: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    _check(A, Q, steps)
    eigenvalues, new = _iterate(A, Q, steps)
    return eigenvalues, new.contiguous()


def _fake(A: Tensor, Q: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    _check(A, Q, steps)
    return A.new_empty(A.shape[:-1]), A.new_empty(A.shape)


common.register(
    "orthogonal_iteration(Tensor A, Tensor Q, int steps) -> (Tensor, Tensor)",
    _implementation,
    _fake,
)
