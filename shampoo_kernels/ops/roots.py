"""The implementations of `inverse_root`, and what they make of blocks that fail.

All write root (B, n, n), residual (B,) and status (B,) for A (B, n, n); `root` may be `previous`.
"""

import bisect
import functools
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_kernels.ops import iterations, small
from shampoo_kernels.ops.common import mirror_lower
from shampoo_kernels.schedules import (
    Step,
    in_squares,
    minimax_coefficients,
    reaches,
    schedule_error,
)

PRODUCT_ROOTS = iterations.PRODUCT_ROOTS
CONVERGED, KEPT_PREVIOUS, FAILED = 0, 2, 3  # inverse_root.RootStatus
RESIDUAL_LIMIT = 0.05
_CUSHIONS = (*(i / 50 for i in range(15)), *(i / 20 for i in range(6, 19)))
# Degrees of steps, the last one of all that follow.
_SEQUENCES = [
    (*first, *fours)
    for first in ((), (2,), (2, 2))
    for fours in ((4,), *((*[4] * count, last) for count in range(1, 6) for last in (1, 2)))
]


# On a CPU the Newton iteration is worth it up to this n, below and from a floor of 1e-5 on, by the
# instruction set of the native product. From a condition of 1e4 on it is 4 to 20 times as accurate
# as LAPACK (1e2: 0.9 to 1.6 times), and about as fast or faster: with p = 2 and 4 at 1e-6 (23 and
# 24 products) n = 256 1.4 to 1.5 times, 512 1.0, above 0.8 to 0.9, or 1.3 for one matrix, which
# both cores share. At 1e-5 (20, 22) it is 0.9 to 1.1 for many blocks of 768 and 1024, at 1e-4 1.1.
# AVX2: 128 1.1 at 1e-6, 256 0.8, and 1.0 to 1.1 at 1e-4 (two Zen 5 cores, 2026-11-26).
_NEWTON_LIMIT = {"avx512": (512, sys.maxsize), "avx2": (128, 128)}


def auto_method(
    device: str, isa: str | None, n: int, p: float, precision: str, ridge: float, floor: float
) -> str:
    """What "auto" stands for: a pure function of the device and, on a CPU, of the instruction set
    of the native product (None: there is none for this dtype), of n, p, precision and damping."""
    if not (p.is_integer() and p <= 64) or floor <= 0:
        return "eigh"
    if device == "cpu":
        # No eigenvalue lies below the floor, so that none saturates.
        exact = p <= 4 and ridge >= floor >= 1e-6
        limit = _NEWTON_LIMIT.get(isa or "", (0, 0))[floor >= 1e-5]
        return "newton" if exact and n <= limit else "eigh"
    # Where 16-bit operands converge for every spectrum; below, newton's half products cost less.
    low = precision != "highest" and floor >= (1e-3 if p == 4 else 1e-4)
    return "product" if low and p in PRODUCT_ROOTS else "newton"


def compute(
    method: str,
    backend: str,
    A: Tensor,
    p: float,
    ridge: float,
    floor: float,
    rank_rtol: float | None,
    previous: Tensor | None,
    root: Tensor,
    residual: Tensor,
    status: Tensor,
    precision: str,
    scale: Tensor | None = None,
) -> None:
    """One method on one backend, of A * scale, scale (B,). Native are eigh, and newton in float32,
    on a CPU; newton of small matrices on a GPU. On Triton iterations."""
    results = (root, residual, status)
    if backend == "native" and _by_native(
        method, A, p, ridge, floor, rank_rtol, scale, previous, *results
    ):
        return
    if scale is not None:
        A = A * scale.view(-1, 1, 1)
    if method == "eigh":
        by_eigh(A, p, ridge, rank_rtol, previous, *results)
    elif backend == "triton":
        from shampoo_kernels.kernels import graphs  # needs triton

        def refresh(inputs: list[Tensor], outputs: list[Tensor]) -> None:
            _in_chunks(method, int(p), ridge, floor, precision, inputs, outputs)

        inputs = [A] if previous is None else [A, previous]
        if graphs.wanted(A):
            name = (method, int(p), ridge, floor, precision)
            graphs.cache.run(name, refresh, inputs, list(results))
        else:
            refresh(inputs, list(results))
    else:
        by_iteration(method, A, int(p), ridge, floor, previous, *results)


def _in_chunks(
    method: str, p: int, ridge: float, floor: float, precision: str,
    inputs: list[Tensor], outputs: list[Tensor],
) -> None:  # fmt: skip
    """An iteration by the Triton kernels on [A] or [A, previous], in parts of bounded memory."""
    from shampoo_kernels.kernels.inverse_root import chunks

    A, *previous = inputs
    for part in chunks(*A.shape[:2]):
        kept = previous[0][part] if previous else None
        results = [result[part] for result in outputs]
        by_iteration(method, A[part], p, ridge, floor, kept, *results, precision=precision)


def _by_native(
    method: str, A: Tensor, p: float, ridge: float, floor: float, rank_rtol: float | None,
    scale: Tensor | None, previous: Tensor | None, root: Tensor, residual: Tensor, status: Tensor,
) -> bool:  # fmt: skip
    """`compute` by the native kernel, if there is one."""
    ops, whole = torch.ops.shampoo_kernels_native, int(p)
    dense = root if _lie_in_rows(root) else root.contiguous()
    rest = (scale, previous, dense, residual, status)
    if method == "newton" and small.takes_root(A):
        steps, cores = steps_with_reach(floor, whole, A.dtype), small.tensor_cores
        ops.inverse_root_small_(A, whole, ridge, steps, cores(A.shape[-1], A.dtype), *rest)
    elif method == "newton" and A.is_cpu and A.dtype == torch.float32:
        ops.inverse_root_newton_(A, whole, ridge, native_steps(floor, whole), *rest)
    elif method == "eigh" and A.is_cpu:
        ops.inverse_root_eigh_(A, p, ridge, rank_rtol, *rest)
    else:
        return False
    if dense is not root:
        root.copy_(dense)
    return True


def _lie_in_rows(stack: Tensor) -> bool:
    """Is every matrix contiguous?"""
    return stack.stride(-1) == 1 and stack.stride(-2) == stack.shape[-1]


@functools.lru_cache(maxsize=64)
def native_steps(floor: float, p: int) -> Tensor:
    """(steps, 5) float32 on the CPU: NewtonSchedule of kernels.h."""
    steps = [
        (*in_squares(step), 0.0, 0.0, 0.0)[:5]
        for step in schedule("newton", floor, p, torch.float32)
    ]
    return torch.tensor(steps, dtype=torch.float32, device="cpu")


def by_iteration(
    method: str,
    A: Tensor,
    p: int,
    ridge: float,
    floor: float,
    previous: Tensor | None,
    root: Tensor,
    residual: Tensor,
    status: Tensor,
    *,
    precision: str | None = None,
) -> None:
    """ "newton" or "product" on (A + ridge*bound*I) / ((1 + ridge)*bound), never synchronising.

    By torch, or with a `precision` by the Triton kernels.
    """
    bound, usable, scale = _bound(A)
    steps = schedule(method, floor, 2 if (method, p) == ("product", 1) else p, A.dtype)
    if precision is not None:
        from shampoo_kernels.kernels import inverse_root as kernels  # needs triton

        arithmetic = kernels.arithmetic(method, A.shape[-1], p, floor, precision)
        X, distance = kernels.iterate(method, A, scale, usable, ridge, p, steps, arithmetic)
    else:
        scaled = mirror_lower(A) / scale.view(-1, 1, 1) / (1 + ridge)
        scaled.diagonal(dim1=-2, dim2=-1).add_(ridge / (1 + ridge))
        scaled = _replace(scaled, ~usable)
        iterate = iterations.newton if method == "newton" else iterations.product
        X, distance = iterate(scaled, p, steps)
    X = X * (_power(scale, -1 / p) * (1 + ridge) ** (-1 / p)).view(-1, 1, 1)
    distance = torch.where(usable, distance, torch.inf)
    _finish(X, distance, bound, p, previous, root, residual, status)


@functools.lru_cache(maxsize=256)
def schedule(method: str, floor: float, p: int, dtype: torch.dtype) -> tuple[Step, ...]:
    """The minimax steps that take the fewest products in the M-form, and of those the ones that
    round least, with small coefficients and a large cushion; for the M-form one of at least
    0.0017^(1/p), because s = cushion is M = cushion^p, all that is left to win a value back from.
    The product form rounds more where the cushion is large (bf16 operands at floor 1e-3: residual
    0.055 against 0.048), and a step more than needed can make it diverge with p = 4: at most 0.3
    for it.

    The M-form takes steps up to degree 4. Those cost a product more than steps of degree 2 and make
    e^5 of an error e instead of e^3: p = 2 takes 16 products at 1e-4 (21 by degrees 1 and 2 alone),
    23 at 1e-6 (25), p = 4 24 at 1e-6 (31). Rounding does what it did (n = 17 to 128, the families
    of tests/matrices.py); schedules that begin with degree 1 round more.

    float32 M-form by degree 2, floor 1e-6, condition 10: p = 2, n = 128, cushion 0.1: error 1.7e-6,
    none: 4.3e-5; p = 4, n = 33, cushion 0.2: 1.6e-6, 0.14: 4.1e-6, none: 1.2e-4; p = 12, n = 24,
    cushion 0.7: 3e-7, 0.3: 4e-5. The steps run to rounding, so that the residual, that of the last
    step's input, is below its limit.
    """
    tolerance = 1e-7 if dtype == torch.float32 else 1e-14
    least, most = (min(0.0017 ** (1 / p), 0.9), 0.9) if method == "newton" else (0.0, 0.3)
    cushions = [c for c in _CUSHIONS if least <= c <= most]
    sequences = [(1,), (2,)]
    if method == "newton":
        sequences += _SEQUENCES

    def make(degrees: Sequence[int], cushion: float) -> tuple[Step, ...]:
        return minimax_coefficients(floor, p, degrees, tolerance=tolerance, cushion=cushion)

    def cost(degrees: Sequence[int], cushion: float) -> float:
        steps = make(degrees, cushion)
        left = (1 + schedule_error(steps[:-1], floor, p)) ** p - 1
        return products(steps, p) if left < 0.9 * RESIDUAL_LIMIT else math.inf

    fewest = min(cost(degrees, cushions[0]) for degrees in sequences)

    def widest(degrees: Sequence[int]) -> float:
        """The largest cushion that costs no more."""
        more = bisect.bisect_right(cushions, fewest, key=lambda cushion: cost(degrees, cushion))
        return cushions[more - 1]

    def rounding(degrees: Sequence[int]) -> float:
        """What rounding goes with: the largest terms of a polynomial, against what is kept of 1."""
        cushion = widest(degrees)
        terms = max(sum(map(abs, step)) for step in make(degrees, cushion))
        return terms / max(cushion, 1e-3)

    best = min((d for d in sequences if cost(d, cushions[0]) == fewest), key=rounding)
    return make(best, widest(best))


def products(steps: Sequence[Step], p: int) -> int:
    """Of the M-form: h(M), h^p M and X h in every step; the first has no X, the last no M."""
    power = p.bit_length() + p.bit_count() - 2
    return sum((len(step) - 1) // 2 + 2 + power for step in steps) - power - 2


@functools.lru_cache(maxsize=256)
def steps_with_reach(floor: float, p: int, dtype: torch.dtype) -> Tensor:
    """The M-form's schedule as rows (a, b, c, s, t, reach), float64 on the CPU: for a kernel that
    leaves out the steps which a matrix does not need (csrc/cuda/launchers.h, RootSteps)."""
    steps = schedule("newton", floor, p, dtype)
    rows = [(*in_squares(step), 0.0, 0.0, 0.0)[:5] for step in steps]
    reach = [torch.inf, *reaches(steps, floor, p)[1:]]
    complete = [(*row, r) for row, r in zip(rows, reach, strict=True)]
    return torch.tensor(complete, dtype=torch.float64, device="cpu")


def by_eigh(
    A: Tensor,
    p: float,
    ridge: float,
    rank_rtol: float | None,
    previous: Tensor | None,
    root: Tensor,
    residual: Tensor,
    status: Tensor,
) -> None:
    """V diag((lambda + ridge*bound)^(-1/p)) Vᵀ by torch.linalg.eigh; synchronises on a GPU."""
    bound, usable, scale = _bound(A)
    scaled = _replace(mirror_lower(A) / scale.view(-1, 1, 1), ~usable)
    values, vectors, solved = _eigh(scaled)
    unit = torch.finfo(A.dtype).eps / 2
    lowest = values[:, :1] if A.shape[-1] else values.new_zeros(A.shape[0], 1)
    allowed = max(ridge, rank_rtol or 0) + 16 * unit
    usable = usable & solved & (lowest[:, 0] >= -allowed)
    powers = (values + ridge).clamp(min=unit) ** (-0.5 / p)
    if rank_rtol is not None:
        powers = torch.where(values > rank_rtol * values[:, -1:], powers, 0)
    half = vectors * powers.unsqueeze(-2)
    X = mirror_lower(half @ half.mT) * _power(scale, -1 / p).view(-1, 1, 1)
    distance = torch.where(usable, torch.zeros_like(bound), torch.inf)
    _finish(X, distance, bound, p, previous, root, residual, status)


def _eigh(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torch.linalg.eigh, and per block whether it came to an end."""
    solved = torch.ones(A.shape[0], dtype=torch.bool, device=A.device)
    try:
        return *torch.linalg.eigh(A), solved
    except torch.linalg.LinAlgError:
        if A.shape[0] == 1:
            return *torch.linalg.eigh(torch.eye(A.shape[-1]).to(A)[None]), ~solved
        values, vectors, each = zip(*(_eigh(block) for block in A.split(1)), strict=True)
        return torch.cat(values), torch.cat(vectors), torch.cat(each)


def _bound(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bound, whether it is one to scale by, and what to divide by; each (B,)."""
    bound = torch.ops.shampoo_kernels.eigenvalue_bound(A)
    usable = bound.isfinite() & (bound > 0)
    return bound, usable, torch.where(usable, bound, 1)


def _replace(A: Tensor, bad: Tensor) -> Tensor:
    """A with the identity in place of bad blocks, so that they cost and harm nothing."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.where(bad.view(-1, 1, 1), eye, A)


def _power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent, rounded once."""
    return (x.double() ** exponent).to(x.dtype)


def _finish(
    X: Tensor,
    distance: Tensor,
    bound: Tensor,
    p: float,
    previous: Tensor | None,
    root: Tensor,
    residual: Tensor,
    status: Tensor,
) -> None:
    """Write X where it is good, else `previous`, else bound^(-1/p)*I, else I."""
    finite = _finite(X)
    good = (distance < RESIDUAL_LIMIT) & finite & _nonzero(X)
    value = _power(bound, -1 / p)
    usable = (bound > 0) & bound.isfinite() & value.isfinite() & (value > 0)
    value = torch.where(usable, value, 1)
    kept = torch.zeros_like(good) if previous is None else _finite(previous)
    other = torch.zeros_like(X)
    other.diagonal(dim1=-2, dim2=-1).copy_(value.view(-1, 1))
    if previous is not None:
        other = torch.where(kept.view(-1, 1, 1), previous, other)
    root.copy_(torch.where(good.view(-1, 1, 1), X, other))
    residual.copy_(torch.where(finite, distance, torch.inf))
    status.copy_(torch.where(good, CONVERGED, torch.where(kept, KEPT_PREVIOUS, FAILED)))


def _finite(A: Tensor) -> Tensor:
    return A.isfinite().flatten(1).all(1)


def _nonzero(A: Tensor) -> Tensor:
    """Has the root not vanished below the smallest number?"""
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    return (
        (diagonal != 0).any(1) if A.shape[-1] else diagonal.new_ones(A.shape[0], dtype=torch.bool)
    )
