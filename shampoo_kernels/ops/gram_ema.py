"""Gram accumulation: stat <- beta*stat + alpha*G W Gᵀ."""

import math

import torch
from torch import Tensor

from shampoo_kernels.chooser import choose_for
from shampoo_kernels.ops import common
from shampoo_kernels.ops.overlap import check_apart
from shampoo_kernels.ops.product import product

SIDES = ("left", "right")
_OP = "gram_ema_"


def gram_ema_(
    stat: Tensor,
    grad: Tensor,
    beta: float | Tensor,
    alpha: float | Tensor,
    *,
    side: str,
    weight: Tensor | None = None,
    precision: str = "highest",
) -> Tensor:
    """Update Shampoo's statistic in place: stat <- beta*stat + alpha*G W Gᵀ; returns `stat`.

    Only the lower triangle of `stat` is read and both are written, so that it is exactly symmetric
    afterwards. Products of 16-bit gradients are exact and summed in float32. On CPUs with
    AVX512-BF16, above 16 rows, subnormal bfloat16 numbers and subnormal sums count as zero.

    Args:
        stat: (*, m, m) for side="left", (*, n, n) for side="right"; float32, or float64.
        grad: (*, m, n), any strides; float32, bfloat16, float16, or float64 into a float64 `stat`.
        beta: decay; a finite real number, or a real tensor of one element or of one per block (B,)
            on the device of `stat`. Where it is 0, `stat` is not read.
        alpha: weight of the new term; as `beta`. Where it is 0, `grad` is not read.
        side: "left" for G W Gᵀ, "right" for Gᵀ W G.
        weight: W, (*, n, n) for side="left", (*, m, m) for side="right", symmetric, dtype of
            `stat`; None is the identity.
        precision: of float32 products on a GPU: "highest", "high" or "medium".

    Raises:
        TypeError: a dtype or type that is not listed; ValueError: any other mismatch, a tensor that
        requires grad, or a `stat` that overlaps itself or an argument. Nothing is changed then.

    Source: Gupta, Koren, Singer 2018 (arXiv 1802.09568); the weight: Morwani et al. 2024
    (arXiv 2406.17748), one step of the power iteration.
    """
    straight = common.check_tensors(_OP, "weight", stat=stat, grad=grad, weight=weight)
    common.check_option(_OP, "side", side, SIDES)
    common.check_option(_OP, "precision", precision, common.PRECISIONS)
    if stat.ndim < 2 or grad.ndim != stat.ndim or grad.shape[:-2] != stat.shape[:-2]:
        raise ValueError(
            f"{_OP}: stat (*, n, n) and grad (*, m, n) must share their batch dimensions, "
            f"got {tuple(stat.shape)} and {tuple(grad.shape)}"
        )
    beta, beta_tensor, beta_straight = _scalar("beta", beta, stat)
    alpha, alpha_tensor, alpha_straight = _scalar("alpha", alpha, stat)
    straight = straight and beta_straight and alpha_straight
    op_ = _implementation if straight else torch.ops.shampoo_kernels.gram_ema_
    op_(
        common.stack_view(_OP, "stat", stat),
        common.stack(grad),
        beta,
        alpha,
        side=side,
        weight=None if weight is None else common.stack(weight),
        beta_tensor=beta_tensor,
        alpha_tensor=alpha_tensor,
        precision=precision,
    )
    return stat


def _scalar(name: str, value: object, stat: Tensor) -> tuple[float, Tensor | None, bool]:
    """A float, a flat tensor in the dtype of `stat` that takes its place, and `check_tensors`."""
    if isinstance(value, Tensor):
        straight = common.check_tensors(_OP, **{name: value})
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{_OP}: {name} must be real, got {common.describe(value)}")
        flat = value if value.ndim == 1 else value.reshape(-1)
        return 0.0, flat if flat.dtype == stat.dtype else flat.to(stat.dtype), straight
    if torch.compiler.is_compiling() and isinstance(value, float):
        # As an argument of the op it would be a constant of the graph, which another value compiles
        # again; as a factor of a tensor it is an input. (torch.full would make it a constant too.)
        return 0.0, stat.new_ones(1) * value, False
    number = common.check_number(_OP, name, value, "a number or a tensor")
    if not math.isfinite(number):
        raise ValueError(f"{_OP}: {name} must be finite, got {number}")
    return number, None, True


def accumulate_(
    stat: Tensor,
    grads: Tensor,
    weight: Tensor | None,
    beta: float,
    alpha: float,
    beta_tensor: Tensor | None = None,
    alpha_tensor: Tensor | None = None,
    *,
    backend: str,
    precision: str = "highest",
) -> None:
    """stat (B, m, m) <- beta*stat + alpha * sum_s G_s W G_sᵀ, W (B, n, n); grads (B, S, m, n), or
    (B, m, n) for S = 1."""
    if backend != "native" and grads.ndim == 3:
        grads = grads.unsqueeze(1)
    if backend == "triton":
        from shampoo_kernels.kernels import gram_ema  # needs triton

        gram_ema.accumulate_(
            stat,
            grads,
            weight,
            beta if beta_tensor is None else beta_tensor,
            alpha if alpha_tensor is None else alpha_tensor,
            precision,
        )
        return
    left = grads
    if weight is not None:
        rows = grads if grads.ndim == 3 else grads.flatten(1, 2)
        rows = product(rows, weight, dtype=stat.dtype, backend=backend)
        left = rows.view(*grads.shape[:-1], weight.shape[-1])
    if backend == "native":
        inner = (
            stat
            if stat.stride(-1) == 1 and stat.stride(-2) >= stat.shape[-1]
            else stat.contiguous()
        )
        torch.ops.shampoo_kernels_native.gram_ema_(
            inner, left, grads, beta, alpha, beta_tensor, alpha_tensor
        )
        if inner is not stat:
            stat.copy_(inner)
        return
    accumulate_ref_(
        stat,
        left,
        grads,
        beta if beta_tensor is None else beta_tensor.view(-1, 1, 1),
        alpha if alpha_tensor is None else alpha_tensor.view(-1, 1, 1),
    )


def accumulate_ref_(
    stat: Tensor, left: Tensor, grads: Tensor, beta: float | Tensor, alpha: float | Tensor
) -> None:
    """stat <- beta*stat + alpha * sum_s left_s G_sᵀ by torch; factors: floats or (1 or B, 1, 1)."""
    left, right = (
        x.to(stat.dtype).transpose(1, 2).flatten(2) for x in (left, grads)
    )  # (B, m, S*n)
    old = _times(beta, stat)
    new = _times(alpha, torch.bmm(left, right.mT))
    stat.copy_(common.mirror_lower(old + new))


def _times(factor: float | Tensor, x: Tensor) -> Tensor:
    """factor * x, where a factor of 0 hides even the NaN in x."""
    if isinstance(factor, Tensor):
        return torch.where(factor == 0, 0, factor * x)
    return torch.zeros_like(x) if factor == 0 else factor * x


def _check(
    stat, grad, beta, alpha, *, side, weight=None, beta_tensor=None, alpha_tensor=None,
    precision="highest",
) -> None:  # fmt: skip
    common.check_option(_OP, "side", side, SIDES)
    common.check_option(_OP, "precision", precision, common.PRECISIONS)
    common.check_dtype(_OP, "stat", stat, common.MASTERS)
    common.check_dtype(_OP, "grad", grad, common.FLOATS)
    if grad.dtype == torch.float64 and stat.dtype != torch.float64:
        raise TypeError(f"{_OP}: a float64 grad needs a float64 stat, got {common.describe(stat)}")
    if grad.ndim != 3:
        raise ValueError(f"{_OP}: grad must be (B, m, n), got {tuple(grad.shape)}")
    batch, m, n = grad.shape
    kept, summed = (m, n) if side == "left" else (n, m)
    why = ("for grad", grad, f'with side="{side}"')
    common.check_shape(_OP, "stat", stat, (batch, kept, kept), *why)
    if weight is not None:
        common.check_dtype(_OP, "weight", weight, (stat.dtype,))
        common.check_shape(_OP, "weight", weight, (batch, summed, summed), *why)
    for name, factor in (("beta", beta_tensor), ("alpha", alpha_tensor)):
        if factor is not None:
            common.check_dtype(_OP, name, factor, (stat.dtype,))
            if factor.shape not in ((1,), (batch,)):
                raise ValueError(
                    f"{_OP}: {name} must have one element or {batch}, one per block, "
                    f"got {tuple(factor.shape)}"
                )
    common.check_same_device(
        _OP, stat, grad=grad, weight=weight, beta=beta_tensor, alpha=alpha_tensor
    )


def _implementation(
    stat, grad, beta, alpha, *, side, weight=None, beta_tensor=None, alpha_tensor=None,
    precision="highest",
) -> None:  # fmt: skip
    _check(
        stat, grad, beta, alpha, side=side, weight=weight, beta_tensor=beta_tensor,
        alpha_tensor=alpha_tensor, precision=precision,
    )  # fmt: skip
    check_apart(_OP, "stat", stat, grad=grad, weight=weight, beta=beta_tensor, alpha=alpha_tensor)
    backend = choose_for(_OP, stat)
    accumulate_(
        stat, grad if side == "left" else grad.mT, weight, beta, alpha, beta_tensor, alpha_tensor,
        backend=backend, precision=precision,
    )  # fmt: skip


common.register(
    "gram_ema_(Tensor(a!) stat, Tensor grad, float beta, float alpha, *, str side, "
    "Tensor? weight=None, Tensor? beta_tensor=None, Tensor? alpha_tensor=None, "
    'str precision="highest") -> ()',
    _implementation,
    _check,
)
