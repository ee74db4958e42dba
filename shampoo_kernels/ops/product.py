"""The product that the ops share: D = b*C + c*A@B over stacks; not a public op."""

import torch
from torch import Tensor

from shampoo_kernels.ops.common import mirror_lower


def product(
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    *,
    b: float = 1.0,
    c: float = 1.0,
    symmetric: bool = False,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str,
) -> Tensor:
    """b*C + c*A@B (B, m, n) for A (B, m, k), B (B, k, n), C (B, m, n), any strides.

    In the dtype of `out`, else `dtype`, else that of A. symmetric=True: the caller knows that the
    result is; half of it is computed and mirrored. `out` may be C. "native" serves float32 results,
    of 16-bit operands too, and computes a block from that block alone.
    """
    dtype = out.dtype if out is not None else dtype or A.dtype
    if backend != "native" or dtype != torch.float32:
        return _by_torch(A.to(dtype), B.to(dtype), C, b, c, symmetric, out)
    A, B = (x.float() if x.dtype == torch.float64 else x for x in (A, B))
    D = out if out is not None and out.stride(-1) == 1 else _empty(A, B)
    base = C if C is None or C.stride(-1) == 1 else C.contiguous()
    beta = 0.0 if C is None else b
    torch.ops.shampoo_kernels_native.product_(D, A, B, base, 0.0, beta, c, symmetric)
    return D if out is None or out is D else out.copy_(D)


def _empty(A: Tensor, B: Tensor) -> Tensor:
    return A.new_empty(A.shape[0], A.shape[1], B.shape[2], dtype=torch.float32)


def _by_torch(
    A: Tensor, B: Tensor, C: Tensor | None, b: float, c: float, symmetric: bool, out: Tensor | None
) -> Tensor:
    if C is None and c == 1 and not symmetric:
        return torch.bmm(A, B) if out is None else torch.bmm(A, B, out=out)
    D = (
        torch.bmm(A, B).mul_(c)
        if C is None
        else torch.baddbmm(C.to(A.dtype), A, B, beta=b, alpha=c)
    )
    D = mirror_lower(D) if symmetric else D
    return D if out is None else out.copy_(D)
