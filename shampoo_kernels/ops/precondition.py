"""Apply preconditioners: left @ G @ right and its squared norm, block by block."""

import torch
from torch import Tensor

from shampoo_kernels.chooser import choose_for
from shampoo_kernels.ops import common
from shampoo_kernels.ops.overlap import check_apart
from shampoo_kernels.ops.product import product

_OP = "precondition"


def precondition(
    grad: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    out: Tensor | None = None,
    precision: str = "highest",
) -> tuple[Tensor, Tensor]:
    """left @ G @ right for every block, and the squared Frobenius norm of the result.

    Computed and returned in float32, in float64 if grad is float64.

    Args:
        grad: (*, m, n), any strides; float64, float32, bfloat16 or float16.
        left: (*, m, m), or None for the identity; float64, float32 or bfloat16 (read in the dtype
            of the result).
        right: (*, n, n), or None for the identity; as `left`.
        out: (*, m, n) in the dtype of the result, receives it; overlaps neither itself nor an
            input.
        precision: of float32 products on a GPU: "highest", "high" or "medium".

    Returns:
        (result (*, m, n), squared norm (*,)) in the dtype of the result. The squares of
        a row are summed in that dtype at least and the rows in float64. In float32 a norm above
        1.8e19 squares to inf, and rows with a norm below 1e-22 may count as 0.

    Raises:
        TypeError: a dtype that is not listed; ValueError: any other mismatch, or a tensor that
        requires grad.

    Source: Gupta, Koren, Singer 2018 (arXiv 1802.09568).
    """
    grad, left, right = common.as_tensors(_OP, grad=grad, left=left, right=right)
    straight = common.check_tensors(
        _OP, "left", "right", "out", grad=grad, left=left, right=right, out=out
    )
    if grad.ndim < 2:
        raise ValueError(f"{_OP}: grad must be (*, m, n), got {tuple(grad.shape)}")
    common.check_option(_OP, "precision", precision, common.PRECISIONS)
    if grad.ndim != 3:  # here, where the shapes are the caller's; else the op says the same
        _check_factors(grad, left, right)
    factors = (None if factor is None else common.stack(factor) for factor in (left, right))
    if out is None:
        op = _implementation if straight else torch.ops.shampoo_kernels.precondition
        result, norm = op(common.stack(grad), *factors, precision=precision)
        return common.unstack(result, grad.shape), common.unstack(norm, grad.shape[:-2])
    common.check_shape(_OP, "out", out, grad.shape, "as grad")
    op_ = _implementation_ if straight else torch.ops.shampoo_kernels.precondition_
    norm = op_(
        common.stack_view(_OP, "out", out), common.stack(grad), *factors, precision=precision
    )
    return out, common.unstack(norm, grad.shape[:-2])


def apply_factors(
    grad: Tensor, left: Tensor | None, right: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    """`precondition` of a stack, for callers whose tensors fit by construction: nothing is checked,
    and autocast must be off."""
    out = common.empty_like(grad, _dtype(grad))
    return out, _precondition_(out, grad, left, right, precision)


def _precondition_(
    out: Tensor, grad: Tensor, left: Tensor | None, right: Tensor | None, precision: str
) -> Tensor:
    """out (B, m, n) <- left (B, m, m) @ grad (B, m, n) @ right (B, n, n); returns (B,).

    Both orders of the two products cost the same, m*n*(m + n).
    """
    backend = choose_for(_OP, out)
    if backend == "triton" and not left is right is None:
        from shampoo_kernels.kernels import precondition as kernels  # needs triton

        left, right = (x if x is None or x.itemsize < 8 else x.float() for x in (left, right))
        return kernels.precondition_(out, grad, left, right, precision)
    if backend == "native" and not left is right is None:
        return _native_(out, grad, left, right)
    if left is not None and right is not None:
        grad = product(left, grad, dtype=out.dtype, backend=backend)
    if right is not None:
        product(grad, right, out=out, backend=backend)
    elif left is not None:
        product(left, grad, out=out, backend=backend)
    else:
        out.copy_(grad)
    # One float32 sum over a million squares is off by 2e-5 on a CPU; sums of rows are not.
    return torch.linalg.vector_norm(out, dim=-1).double().square().sum(-1).to(out.dtype)


def _native_(out: Tensor, grad: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    left, right = (x if x is None or x.itemsize < 8 else x.float() for x in (left, right))
    by_rows = out.stride(-1) == 1 and out.stride(-2) >= out.shape[-1]
    dense = out if by_rows else common.empty_like(out)
    norm = torch.ops.shampoo_kernels_native.precondition_(dense, grad, left, right)
    if not by_rows:
        out.copy_(dense)
    return norm


def _dtype(grad: Tensor) -> torch.dtype:
    return torch.float64 if grad.dtype == torch.float64 else torch.float32


def _check_factors(grad: Tensor, left: Tensor | None, right: Tensor | None) -> None:
    *batch, m, n = grad.shape
    for name, factor, size in (("left", left, m), ("right", right, n)):
        if factor is not None:
            common.check_shape(_OP, name, factor, (*batch, size, size), "for grad", grad)


def _check(grad, left, right, *, precision="highest") -> None:
    common.check_option(_OP, "precision", precision, common.PRECISIONS)
    common.check_dtype(_OP, "grad", grad, common.FLOATS)
    if grad.ndim != 3:
        raise ValueError(f"{_OP}: grad must be (B, m, n), got {tuple(grad.shape)}")
    for name, factor in (("left", left), ("right", right)):
        if factor is not None:
            common.check_dtype(_OP, name, factor, (*common.MASTERS, torch.bfloat16))
    _check_factors(grad, left, right)
    common.check_same_device(_OP, grad, left=left, right=right)


def _check_out(out, grad, left, right, *, precision="highest") -> None:
    _check(grad, left, right, precision=precision)
    common.check_dtype(_OP, "out", out, (_dtype(grad),))
    common.check_shape(_OP, "out", out, grad.shape, "as grad")
    common.check_same_device(_OP, grad, out=out)


def _implementation_(out, grad, left, right, *, precision="highest") -> Tensor:
    _check_out(out, grad, left, right, precision=precision)
    check_apart(_OP, "out", out, grad=grad, left=left, right=right)
    return _precondition_(out, grad, left, right, precision)


def _implementation(grad, left, right, *, precision="highest") -> tuple[Tensor, Tensor]:
    _check(grad, left, right, precision=precision)
    return apply_factors(grad, left, right, precision)


def _fake_(out, grad, left, right, *, precision="highest") -> Tensor:
    _check_out(out, grad, left, right, precision=precision)
    return out.new_empty(out.shape[0])


def _fake(grad, left, right, *, precision="highest") -> tuple[Tensor, Tensor]:
    _check(grad, left, right, precision=precision)
    out = common.empty_like(grad, _dtype(grad))
    return out, out.new_empty(out.shape[0])


_ARGUMENTS = 'Tensor grad, Tensor? left, Tensor? right, *, str precision="highest"'
common.register(f"precondition({_ARGUMENTS}) -> (Tensor, Tensor)", _implementation, _fake)
common.register(f"precondition_(Tensor(a!) out, {_ARGUMENTS}) -> Tensor", _implementation_, _fake_)
