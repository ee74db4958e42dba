"""The inverse roots of the statistics on stacks of blocks: their scale and refresh."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo_kernels.chooser import choose
from shampoo_kernels.ops.eigenvalue_bound import eigenvalue_bound
from shampoo_kernels.ops.inverse_root import compute_, empty_results
from shampoo_kernels.ops.moments import bias
from shampoo_kernels.ops.norms import matrix_norms, per_block
from shampoo_kernels.optim.blocks import LEFT
from shampoo_kernels.optim.stacks import Stack
from shampoo_kernels.optim.statistics import statistic_bias

# Bytes of workspace of one call of inverse_root, its argument and result included.
ROOT_BYTES = 64 << 20

SCALES = ("trace", "least_squares", None)


def refresh_roots_(stack: Stack, due: Sequence[int], moves: Tensor, group: dict) -> None:
    """Compute the roots of the blocks in `due` anew where moves (B,) is 1.

    The preconditioner is H = c L ⊗ R, L and R bias-corrected. Scaling each factor by c^(1/2) before
    its root makes the scale part of the roots: L'^(-1/pl) G R'^(-1/pr) with L' = c^(1/2) L, which
    for pl = pr = p is c^(-1/p) L^(-1/p) G R^(-1/p). c is

    - "trace": E‖G‖² / (tr L tr R), so that tr H is right; 1 / tr L for statistic="shampoo", where
      all three are equal (arXiv 2406.17748);
    - "least_squares": <E[g gᵀ], L ⊗ R> / (‖L‖ ‖R‖)², with which H is nearest to E[g gᵀ];
    - None: 1. With p = 4 and statistic="shampoo" that is the original Shampoo (arXiv 1802.09568).

    With one factor, H = L ⊗ I / n, n the length of the other side, has both the right trace and
    the least distance. With a scale, one step of a single gradient has unit scale, whatever the
    gradient's. With refresh_tolerance, roots that still fit are kept: see `_misfit`.
    """
    # an all-zero matrix, which scales by Inf, keeps its previous root
    scales = _scale(stack, group).nan_to_num(0, 0) * moves
    for side in stack.key.sides:
        p = group["p"][0 if side == LEFT else 1]
        for part in _root_parts(stack, side, due, group):
            statistic, scale = stack.statistic[side][part], scales[part]
            if group["refresh_tolerance"] is not None:
                root = stack.root[side][part].to(stack.dtype)
                misfit = _misfit(statistic * per_block(scale), root, p, group["ridge"])
                unfit = misfit > group["refresh_tolerance"]
                part, local = narrowed(stack, part, unfit)
                statistic, scale = statistic[local], torch.where(unfit, scale, 0)[local]
            root = stack.root[side][part].to(stack.dtype)  # itself, or a copy
            residual, status = empty_results(root)
            compute_(
                root,
                residual,
                status,
                statistic,
                float(p),
                ridge=group["ridge"],
                rank_rtol=group["rank_rtol"],
                method=group["root_method"],
                precision=group["precision"],
                previous=root,
                scale=scale,
            )
            if not (isinstance(part, slice) and stack.root[side].dtype == stack.dtype):
                stack.root[side][part] = root.to(stack.root[side].dtype)
            stack.status[side][part] = status


def _scale(stack: Stack, group: dict) -> Tensor:
    """(B,): what turns the accumulated statistics, either side's, into the bias-corrected, scaled
    ones."""
    correction = statistic_bias(stack.steps, group)
    if group["scale"] is None:
        return 1 / correction
    if len(stack.key.sides) == 1:
        other = stack.key.n if stack.key.sides[0] == LEFT else stack.key.m
        return 1 / (correction * (other if group["statistic"] == "shampoo" else 1))
    if "energy" not in stack.extra:  # both traces are ‖G‖²
        return (correction * _trace(stack.statistic[LEFT])).rsqrt()
    measure = _trace if group["scale"] == "trace" else matrix_norms
    energy = stack.extra["energy"] / bias(stack.steps, group["shampoo_beta"])
    left, right = map(measure, stack.statistic.values())
    return energy.sqrt() / left.sqrt() / right.sqrt()  # the product of the two may underflow


def _trace(A: Tensor) -> Tensor:
    return A.diagonal(dim1=-2, dim2=-1).sum(-1)


def _misfit(A: Tensor, root: Tensor, p: float, ridge: float) -> Tensor:
    """‖X^a (A + ridge) X^b - I‖ / sqrt(d) (b,), X the root, a + b = p as equal as can be.

    The root mean square over the directions of how far the old root is from whitening A now: 0
    where it is A's own, e where A is (1 + e) times what it was, 1 where there is no root.
    """
    d = A.shape[-1]
    A = A.clone()
    A.diagonal(dim1=-2, dim2=-1).add_((ridge * eigenvalue_bound(A))[:, None])
    left = torch.linalg.matrix_power(root, int(p) // 2)
    right = left if p % 2 == 0 else left @ root
    white = left @ A @ right
    white.diagonal(dim1=-2, dim2=-1).sub_(1)
    return matrix_norms(white) / d**0.5


def narrowed(stack: Stack, part: slice | Tensor, wanted: Tensor) -> tuple[slice | Tensor, Any]:
    """(part, what picks it from the piece that `part` was): the blocks where `wanted` (b,) is true.

    On an accelerator, where looking would mean waiting, all of them: it is the caller who leaves
    the others as they are.
    """
    if stack.device.type != "cpu":
        return part, slice(None)
    return torch.arange(len(stack.blocks))[part][wanted], wanted


def _root_parts(
    stack: Stack, side: str, due: Sequence[int], group: dict
) -> Iterator[slice | Tensor]:
    """`due` in pieces that keep the workspace of inverse_root below ROOT_BYTES, as indices."""
    d = stack.dimension(side)
    matrices = _matrices(stack, group["root_method"])
    if group["refresh_tolerance"] is not None:
        matrices = max(matrices, 7)  # `_misfit`'s own
    return pieces(stack, due, max(1, ROOT_BYTES // (matrices * d * d * stack.dtype.itemsize)))


def pieces(stack: Stack, due: Sequence[int], count: int) -> Iterator[slice | Tensor]:
    """`due` in pieces of at most `count`, as what indexes the stack."""
    for start in range(0, len(due), count):
        piece = due[start : start + count]
        if isinstance(piece, range):
            yield slice(piece.start, piece.stop, piece.step)
        else:
            yield torch.tensor(piece).to(stack.device, non_blocking=True)


def _matrices(stack: Stack, method: str) -> int:
    """d x d matrices per block that a refresh takes, in the implementation that takes most.

    Native kernels keep their workspace per thread and write into the state; what remains are copies
    of a block and its root where no slice picks them. The torch iterations take 12 in all.
    """
    native = choose("inverse_root", stack.device.type, stack.dtype) == "native"
    kernel = method in ("auto", "eigh") or (method == "newton" and stack.dtype == torch.float32)
    return 2 if native and kernel else 12
