"""Adam in the eigenbasis of the statistics, on stacks of blocks: SOAP."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_kernels.ops import moments
from shampoo_kernels.ops.inverse_root import RootStatus
from shampoo_kernels.ops.norms import matrix_norms, per_block
from shampoo_kernels.ops.orthogonal_iteration import orthogonal_iteration
from shampoo_kernels.ops.precondition import apply_factors
from shampoo_kernels.optim.blocks import LEFT, RIGHT
from shampoo_kernels.optim.factors import narrowed, pieces
from shampoo_kernels.optim.stacks import Stack

# Bytes of the matrices of one part of a refresh; it takes about 12 a block.
BASIS_BYTES = 64 << 20

BASIS_METHODS = ("orthogonal_iteration", "eigh")


def rotate(stack: Stack, matrices: Tensor, precision: str) -> Tensor:
    """Q_Lᵀ G Q_R (B, m, n): the blocks in their eigenbasis."""
    left, right = stack.left_right()
    return apply_factors(matrices, _transposed(left), right, precision)[0]


def direction(stack: Stack, momentum: Tensor, rule: moments.Rule, precision: str) -> Tensor:
    """U (B, m, n) = Q_L (M' / (sqrt(v) + eps root_bias)) Q_Rᵀ, M' = Q_Lᵀ M Q_R: see `Rule`.

    v is the second moment of the rotated gradient. Before there is a basis it is I, and this is
    Adam. Source: Vyas et al., SOAP (arXiv 2409.11321).
    """
    rotated = rotate(stack, momentum, precision)
    own = moments.direction(rotated, stack.extra["exp_avg_sq"], stack.steps, rule)
    left, right = stack.left_right()
    return apply_factors(own, left, _transposed(right), precision)[0]


def refresh_(stack: Stack, due: Sequence[int], first: set[int], moves: Tensor, group: dict) -> None:
    """Compute the bases of the blocks in `due` anew where moves (B,) is 1, and move v along.

    By one step of orthogonal iteration from the basis as it is, or by eigh: always, with
    basis_method="eigh", else for the blocks in `first`. With T = Qᵀ Q_new on each side,
    v <- (T_L∘T_L)ᵀ v (T_R∘T_R): what the second moments are in the new basis if entries are
    uncorrelated in the old one. For a permutation that is v permuted, and its sum always stays.
    """
    whole = group["basis_method"] == "eigh"
    batches = [(due, True)] if whole else [
        (sorted(first), True), ([i for i in due if i not in first] if first else due, False)
    ]  # fmt: skip
    d = max(stack.key.m, stack.key.n)
    exp_avg_sq = stack.extra["exp_avg_sq"]
    count = max(1, BASIS_BYTES // (12 * d * d * stack.dtype.itemsize))
    for blocks, by_eigh in batches:
        for part in pieces(stack, blocks, count):
            turns = {
                side: _refresh_side_(stack, side, part, by_eigh, moves[part], group)
                for side in stack.key.sides
            }
            left, right = turns.get(LEFT), turns.get(RIGHT)
            moved, _ = apply_factors(
                exp_avg_sq[part],
                None if left is None else left.mT.square(),
                None if right is None else right.square(),
                group["precision"],
            )
            exp_avg_sq[part] = torch.where(per_block(moves[part] > 0), moved, exp_avg_sq[part])


def _refresh_side_(
    stack: Stack, side: str, part: slice | Tensor, by_eigh: bool, moves: Tensor, group: dict
) -> Tensor:
    """Put new bases and eigenvalues into the stack; returns T (b, d, d) = Qᵀ Q_new."""
    A, old = stack.statistic[side][part], stack.root[side][part].to(stack.dtype)
    known = stack.extra[f"{side}_values"][part]
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    largest = A.abs().amax((-2, -1))
    usable = (largest > 0) & largest.isfinite() & (moves > 0)
    if group["refresh_tolerance"] is not None:
        usable &= (_misfit(A, old) > group["refresh_tolerance"]) | (known.amax(-1) == 0)
    scale = torch.where(usable, largest, 1)
    A = torch.where(per_block(usable), A / per_block(scale), eye)
    part, local = narrowed(stack, part, usable)
    if by_eigh:
        values, new = torch.linalg.eigh(A[local])
    else:
        values, new = orthogonal_iteration(A[local], old[local])
    good = usable[local] & values.isfinite().all(-1)
    values = values.clamp(min=0) * scale[local][:, None]
    turn = eye.expand_as(old).clone()
    turn[local] = torch.where(per_block(good), old[local].mT @ new, eye)
    stack.root[side][part] = torch.where(per_block(good), new, old[local]).to(
        stack.root[side].dtype
    )
    stack.extra[f"{side}_values"][part] = torch.where(good[:, None], values, known[local])
    stack.status[side][part] = torch.where(
        good, RootStatus.CONVERGED.value, RootStatus.KEPT_PREVIOUS.value
    ).to(torch.int8)
    return turn


def _misfit(A: Tensor, Q: Tensor) -> Tensor:
    """‖B - diag B‖ / ‖B‖ (b,), B = Qᵀ A Q (arXiv 2506.03595)."""
    B = Q.mT @ A @ Q
    norm = matrix_norms(B)
    B.diagonal(dim1=-2, dim2=-1).zero_()
    return matrix_norms(B) / torch.where(norm > 0, norm, 1)


def _transposed(Q: Tensor | None) -> Tensor | None:
    return None if Q is None else Q.mT
