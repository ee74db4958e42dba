"""Inverse p-th roots of symmetric positive semi-definite matrices: (A + ridge*bound*I)^(-1/p)."""

import enum
import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_kernels import native
from shampoo_kernels.chooser import choose_for
from shampoo_kernels.ops import common, roots, small
from shampoo_kernels.ops.overlap import check_apart, check_same_or_apart

_OP = "inverse_root"
METHODS = ("auto", "newton", "product", "eigh")
FALLBACKS = ("previous", "eigh")


class RootStatus(enum.IntEnum):
    """What became of a block."""

    CONVERGED = 0
    FELL_BACK = 1
    KEPT_PREVIOUS = 2
    FAILED = 3


class InverseRoot(NamedTuple):
    """Result of `inverse_root`: root (*, n, n), residual (*,), status (*,) int8 of `RootStatus`."""

    root: Tensor
    residual: Tensor
    status: Tensor


def inverse_root(
    A: Tensor,
    p: int | float | Fraction,
    *,
    ridge: float = 1e-6,
    design_floor: float | None = None,
    method: str = "auto",
    precision: str = "highest",
    rank_rtol: float | None = None,
    previous: Tensor | None = None,
    fallback: str = "previous",
    out: Tensor | None = None,
) -> InverseRoot:
    """X with X^p (A + ridge*bound*I) = I for every block, bound = `eigenvalue_bound(A)`.

    Numbers never raise: a block that is NaN, Inf, all zero or more indefinite than -ridge*bound, or
    on which an iteration does not converge, keeps `previous` where that is finite (KEPT_PREVIOUS),
    else becomes bound^(-1/p)*I where the bound is positive and finite, else I (both FAILED). No
    block touches another, and no root holds NaN or Inf. Every root is exactly symmetric.

    Args:
        A: (*, n, n) float32 or float64, symmetric; only the lower triangle is read.
        p: the root, positive; an integer from 1 to 64 for "newton", 1, 2 or 4 for "product", any
            int, float or Fraction for "eigh".
        ridge: relative damping, >= 0.
        design_floor: smallest eigenvalue, relative to the bound, that the schedule of "newton" and
            "product" is made for. Default: ridge, at least 1e-6 in float32. A block with smaller
            ones after the ridge does not converge as a rule and keeps `previous` or FAILs: so do
            rank-deficient blocks in float32 with a ridge below 1e-6, or with any design_floor well
            above the ridge. Take a larger ridge, method="eigh" or fallback="eigh" for them.
        method: "newton" (coupled M-form), "product" (product form), "eigh", or "auto": "eigh" for
            a p that has no iteration; on a CPU "newton" where it is as fast as "eigh" (float32, p
            to 4, ridge >= design_floor >= 1e-6, native kernels), with "eigh" for blocks on which it
            does not converge, else "eigh"; on a GPU an iteration chosen by precision.
        precision: the least of float32 products on a GPU; more where the design_floor demands it.
            "high" with "newton" needs a design_floor (by default the ridge) >= 1e-4, "medium" needs
            "product" and >= 1e-5. On any device "product" with p = 4 in float32 needs >= 1e-6.
        rank_rtol: with "eigh", eigenvalues <= rank_rtol * the largest count as zero and
            contribute nothing: the root of the pseudo-inverse.
        previous: (*, n, n), dtype of A: the roots to keep where a block fails.
        fallback: "previous", or "eigh": blocks on which an iteration did not converge are computed
            again (FELL_BACK).
        out: (*, n, n), dtype of A, receives the roots; may be `previous`, else overlaps neither
            itself nor an input.

    Returns:
        InverseRoot(root, residual, status). The residual is the method's own measure of
        convergence (newton, product: largest entry of |X^p A - I| as the schedule tracks it before
        its last step; eigh: 0 or inf); it detects divergence, not rounding. CONVERGED and
        FELL_BACK mean finite and below 0.05.

    Raises:
        TypeError: a dtype or type that is not listed; ValueError: any other mismatch.

    "newton" and "product" with fallback="previous" never synchronise with a GPU; "eigh" does.
    There they need at most four stacks of workspace beside the result, of a large stack less: its
    blocks are worked on in parts of 64 MiB.

    Sources: Guo and Higham 2006 (SIMAX 28:788); minimax steps as in Polar Express
    (arXiv 2505.16932); failure policy after Anil et al. 2020 (arXiv 2002.09018).
    """
    A, previous = common.as_tensors(_OP, A=A, previous=previous)
    straight = common.check_tensors(_OP, "previous", "out", A=A, previous=previous, out=out)
    common.check_square(_OP, "A", A, batched=False)
    for name, tensor in (("previous", previous), ("out", out)):
        if tensor is not None:
            common.check_shape(_OP, name, tensor, A.shape, "as A")
    _check_options(method, precision, fallback)
    arguments = {
        "ridge": _number("ridge", ridge),
        "design_floor": None if design_floor is None else _number("design_floor", design_floor),
        "method": method,
        "precision": precision,
        "rank_rtol": None if rank_rtol is None else _number("rank_rtol", rank_rtol),
        "previous": None if previous is None else common.stack(previous),
        "fallback": fallback,
    }
    p, stack = _number("p", p), common.stack(A)
    if out is None:
        op = _implementation if straight else torch.ops.shampoo_kernels.inverse_root
        root, residual, status = op(stack, p, **arguments)
        root = common.unstack(root, A.shape)
    else:
        root = common.stack_view(_OP, "out", out)
        residual, status = empty_results(stack)
        op_ = _implementation_ if straight else torch.ops.shampoo_kernels.inverse_root_
        op_(root, residual, status, stack, p, **arguments)
        root = out
    batch = A.shape[:-2]
    return InverseRoot(root, common.unstack(residual, batch), common.unstack(status, batch))


def _number(name: str, value: object) -> float:
    return common.check_number(_OP, name, value)


def _check_options(method: object, precision: object, fallback: object) -> None:
    common.check_option(_OP, "method", method, METHODS)
    common.check_option(_OP, "precision", precision, common.PRECISIONS)
    common.check_option(_OP, "fallback", fallback, FALLBACKS)


def empty_results(A: Tensor) -> tuple[Tensor, Tensor]:
    return A.new_empty(A.shape[0]), A.new_empty(A.shape[0], dtype=torch.int8)


def _floor(A: Tensor, ridge: float, design_floor: float | None) -> float:
    if design_floor is not None:
        return design_floor
    return max(ridge, 1e-6) if A.dtype == torch.float32 else ridge


def _check(
    A, p, *, ridge=1e-6, design_floor=None, method="auto", precision="highest", rank_rtol=None,
    previous=None, fallback="previous",
) -> None:  # fmt: skip
    common.check_dtype(_OP, "A", A, common.MASTERS)
    common.check_square(_OP, "A", A)
    _check_options(method, precision, fallback)
    if previous is not None:
        common.check_dtype(_OP, "previous", previous, (A.dtype,))
        common.check_shape(_OP, "previous", previous, tuple(A.shape), "as A")
        common.check_same_device(_OP, A, previous=previous)
    for name, value, valid, expected in (
        ("p", p, 0 < p < math.inf, "positive and finite"),
        ("ridge", ridge, 0 <= ridge < math.inf, "finite and >= 0"),
        ("design_floor", design_floor, design_floor is None or 0 < design_floor < 1, "in (0, 1)"),
        ("rank_rtol", rank_rtol, rank_rtol is None or 0 <= rank_rtol < 1, "in [0, 1)"),
    ):
        if not valid:
            raise ValueError(f"{_OP}: {name} must be {expected}, got {value}")
    if rank_rtol is not None and method not in ("auto", "eigh"):
        raise ValueError(f'{_OP}: rank_rtol needs method="eigh", got method="{method}"')
    if method in ("newton", "product"):
        _check_iteration(method, p, precision, _floor(A, ridge, design_floor), A.dtype)


def _check_iteration(
    method: str, p: float, precision: str, floor: float, dtype: torch.dtype
) -> None:
    if method == "newton" and not (p.is_integer() and p <= 64):
        raise ValueError(f'{_OP}: p must be an integer from 1 to 64 for method="newton", got {p}')
    if method == "product" and p not in roots.PRODUCT_ROOTS:
        raise ValueError(f'{_OP}: p must be 1, 2 or 4 for method="product", got {p}')
    if not 0 < floor < 1:
        raise ValueError(
            f'{_OP}: method="{method}" needs a ridge or a design_floor in (0, 1), got {floor}'
        )
    needed = {("newton", "high"): 1e-4, ("product", "medium"): 1e-5}.get((method, precision), 0)
    if method == "newton" and precision == "medium":
        raise ValueError(f'{_OP}: precision="medium" needs method="product", got method="newton"')
    if (method, p, dtype) == ("product", 4, torch.float32):
        needed = max(needed, 1e-6)  # below it one wide spectrum in six does not converge
    if floor < needed:
        raise ValueError(
            f'{_OP}: precision="{precision}" with method="{method}" needs ridge (or design_floor) '
            f">= {needed:g}, got {floor:g}"
        )


def compute_(
    root, residual, status, A, p, *, ridge=1e-6, design_floor=None, method="auto",
    precision="highest", rank_rtol=None, previous=None, fallback="previous", scale=None,
) -> None:  # fmt: skip
    """`inverse_root` of A (B, n, n), of scale * A where there is a scale (B,), into `root`, without
    a check; `root` may be `previous`."""
    floor = _floor(A, ridge, design_floor)
    backend = choose_for(_OP, A)
    retry = fallback == "eigh"
    if method == "auto":
        method = "eigh"
        if rank_rtol is None:
            isa = native.isa() if backend == "native" and A.dtype == torch.float32 else None
            method = roots.auto_method(A.device.type, isa, A.shape[-1], p, precision, ridge, floor)
        retry = retry or A.device.type == "cpu"
    if backend == "native" and A.is_cuda and not (method == "newton" and small.takes_root(A)):
        backend = choose_for(_OP, A, but="native")
    results = (root, residual, status)
    roots.compute(
        method, backend, A, p, ridge, floor, rank_rtol, previous, *results, precision, scale
    )
    if retry and method != "eigh":
        _fall_back(*results, A, p, ridge, fallback, scale)


def _fall_back(
    root: Tensor, residual: Tensor, status: Tensor, A: Tensor, p: float, ridge: float,
    fallback: str, scale: Tensor | None,
) -> None:  # fmt: skip
    """Compute the blocks that did not converge again, by eigh; where it fails too, keep them."""
    if not status.any():  # CONVERGED is 0
        return
    again = status.nonzero().squeeze(1)
    A = A[again] if scale is None else A[again] * scale[again, None, None]
    part = torch.ops.shampoo_kernels.inverse_root(A, p, ridge=ridge, method="eigh")
    solved = part[2] == RootStatus.CONVERGED
    again = again[solved]
    root[again], residual[again] = part[0][solved], part[1][solved]
    status[again] = RootStatus.FELL_BACK if fallback == "eigh" else RootStatus.CONVERGED


def _implementation(A, p, **options) -> tuple[Tensor, Tensor, Tensor]:
    _check(A, p, **options)
    root = common.empty_like(A)
    residual, status = empty_results(A)
    compute_(root, residual, status, A, p, **options)
    return root, residual, status


def _implementation_(root, residual, status, A, p, **options) -> None:
    _check_out(root, residual, status, A, p, **options)
    previous = options.get("previous")
    check_same_or_apart(_OP, "out", root, previous=previous)
    check_apart(_OP, "out", root, A=A, residual=residual, status=status)
    check_apart(_OP, "residual", residual, A=A, previous=previous, status=status)
    check_apart(_OP, "status", status, A=A, previous=previous)
    compute_(root, residual, status, A, p, **options)


def _check_out(root, residual, status, A, p, **options) -> None:
    _check(A, p, **options)
    common.check_same_device(_OP, A, out=root, residual=residual, status=status)
    for name, tensor, shape, dtype in (
        ("out", root, tuple(A.shape), A.dtype),
        ("residual", residual, (A.shape[0],), A.dtype),
        ("status", status, (A.shape[0],), torch.int8),
    ):
        common.check_dtype(_OP, name, tensor, (dtype,))
        common.check_shape(_OP, name, tensor, shape)


def _fake(A, p, **options) -> tuple[Tensor, Tensor, Tensor]:
    _check(A, p, **options)
    return common.empty_like(A), *empty_results(A)


_OPTIONS = (
    'Tensor A, float p, *, float ridge=1e-6, float? design_floor=None, str method="auto", '
    'str precision="highest", float? rank_rtol=None, Tensor? previous=None, '
    'str fallback="previous"'
)
common.register(f"inverse_root({_OPTIONS}) -> (Tensor, Tensor, Tensor)", _implementation, _fake)
common.register(
    f"inverse_root_(Tensor(a!) root, Tensor(b!) residual, Tensor(c!) status, {_OPTIONS}) -> ()",
    _implementation_,
    _check_out,
)
