"""The product kernel in plain torch, with its roundings: operands in the mode's dtype, sums in
float32, results rounded to nearest. Faster than the interpreter, and right for bfloat16."""

import torch

from shampoo_kernels.kernels import table


def product(
    A, B, D, *, op, a=0.0, b=0.0, c=1.0, C=None, D16=None, scale16=1.0, lift=None,
    symmetric=False, measure=None, precision="highest",
):  # fmt: skip
    out = torch.zeros(D.shape, dtype=torch.float32)
    if A is not None:
        dtype, _ = table.MODES[table.mode(A.dtype, B.dtype, precision, "sm_90")]
        A, B = (x.to(dtype or x.dtype).float() for x in (A, B))
        out = _times(c, A @ B, D.ndim)
    if C is not None:
        C = C.float() if lift is None else _times(lift, C.float(), D.ndim)
        out = out + _times(b, C, D.ndim)
    eye = torch.eye(D.shape[-2], D.shape[-1])
    out = out + _times(a, eye.expand(D.shape), D.ndim)
    if symmetric:
        out = out.tril() + out.tril(-1).mT
    D.copy_(out)
    if D16 is not None:
        D16.copy_(scale16 * out)
    if measure is None:
        return None
    if measure == "distance":
        return (out - eye).abs().nan_to_num(nan=torch.inf).amax((-2, -1)).view(-1, 1)
    return out.square().sum((-2, -1)).view(-1, 1)


def _times(factor, x, ndim):
    if isinstance(factor, torch.Tensor):
        factor = factor.view(-1, 1, 1)
        return torch.where(factor == 0, 0.0, factor * x)
    return torch.zeros_like(x) if factor == 0 else factor * x
