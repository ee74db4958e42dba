"""The one product that the iterations are made of: D = a*I + b*C + c*A@B over stacks."""

import torch
from torch import Tensor

from shampoo_kernels.ops.common import mirror_lower


def product(
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    *,
    a: float = 0.0,
    b: float = 0.0,
    c: float = 1.0,
    symmetric: bool = False,
    out: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """a*I + b*C + c*A@B for A (B, m, k), B (B, k, n), C (B, m, n), in the dtype of `out`.

    symmetric=True: the caller knows that the result is; half of it is computed and mirrored. `out`
    may be C, and is float32 or float64 with contiguous rows. "native" serves float32 alone, with
    16-bit operands too; every other case takes torch.
    """
    if backend == "native" and (out if out is not None else A).dtype == torch.float32:
        if out is None:
            out = A.new_empty(A.shape[0], A.shape[1], B.shape[2])
        base = C if C is None or C.stride(-1) == 1 else C.contiguous()
        torch.ops.shampoo_kernels_native.product_(out, A, B, base, a, b, c, symmetric)
        return out
    dtype = A.dtype if out is None else out.dtype
    A, B = A.to(dtype), B.to(dtype)
    if C is None:
        D = torch.bmm(A, B) if c == 1 else torch.bmm(A, B).mul_(c)
    else:
        D = torch.baddbmm(C.to(dtype), A, B, beta=b, alpha=c)
    if symmetric:
        D = mirror_lower(D)
    if a:
        D.diagonal(dim1=-2, dim2=-1).add_(a)
    return D if out is None else out.copy_(D)
