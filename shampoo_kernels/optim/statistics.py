"""The statistics L and R on stacks of blocks: what one gradient adds to them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_kernels.chooser import choose_for
from shampoo_kernels.ops.gram_ema import accumulate_
from shampoo_kernels.ops.moments import bias
from shampoo_kernels.ops.norms import block_norms, matrix_norms, per_block
from shampoo_kernels.ops.precondition import apply_factors
from shampoo_kernels.optim.batch import Batch
from shampoo_kernels.optim.blocks import LEFT, RIGHT
from shampoo_kernels.optim.stacks import Stack

OTHER = {LEFT: RIGHT, RIGHT: LEFT}


def update_(batch: Batch, grads: Sequence[Tensor], moves: Tensor, group: dict) -> None:
    """Add gradients to L and R where moves (blocks,) is 1; bit for bit unchanged where it is 0.

    L <- beta L + (1 - beta) T, or with beta = 1 the running sum L <- L + T (Adagrad), where T is

    - "shampoo": G Gᵀ (Gupta, Koren, Singer, arXiv 1802.09568);
    - "frobenius": G W Gᵀ, W = R / ‖R‖², a step of the power iteration towards the Kronecker product
      nearest to E[g gᵀ] (Morwani et al., arXiv 2406.17748). The first W is I / ‖G‖, with which
      R ⊗ L is at first Shampoo's, trace scaling included;
    - "kl": (G X)(G X)ᵀ / n, X the inverse square root of R as it was last computed: the fixed point
      minimises a Kullback-Leibler divergence (arXiv 2509.03378). L and R start as rms(G) I, G the
      first gradient, where the authors take 0.1 I, which depends on the gradient's scale.

    R likewise, of Gᵀ; both from the old values. With a factor on one side only, the other one is I:
    W = I / n, X = I. "energy", where there is one, is the same average of ‖G‖², or with
    scale="least_squares" of <G, L G R> / (‖L‖ ‖R‖).
    """
    numbers = (batch.split(x) for x in (moves, *_weights(moves, group["shampoo_beta"])))
    for part, grad, move, keep, alpha in zip(batch.parts, grads, *numbers, strict=True):
        _update_(part, grad, move, keep, alpha, group)


def _update_(
    stack: Stack, grad: Tensor, moves: Tensor, keep: Tensor, alpha: Tensor, group: dict
) -> None:
    if group["statistic"] == "kl":
        _start_kl_(stack, grad, moves)
    terms = [(side, *_term(stack, side, grad, moves, group)) for side in stack.key.sides]
    backend = choose_for("gram_ema_", stack.steps)
    for side, factor, scale, weight in terms:
        accumulate_(
            stack.statistic[side], factor if side == LEFT else factor.mT, weight, 0.0, 0.0, keep,
            alpha * scale if scale != 1 else alpha, backend=backend, precision=group["precision"],
        )  # fmt: skip
    if "energy" in stack.extra:
        new = block_norms(grad).square()
        if group["scale"] == "least_squares":
            new = _alignment(stack, grad, group["precision"])
        stack.extra["energy"].mul_(keep).add_(alpha * new)


def statistic_bias(steps: Tensor, group: dict) -> Tensor:
    """(B,): what L and R are to be divided by. A sum is taken as it is; "kl" has its start."""
    if group["statistic"] == "kl":
        return torch.ones_like(steps)
    return bias(steps, group["shampoo_beta"])


def _weights(moves: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(of the old value, of the new term), both (B,)."""
    if beta == 1:
        return torch.ones_like(moves), moves
    alpha = moves * (1 - beta)
    return 1 - alpha, alpha


def _term(
    stack: Stack, side: str, grad: Tensor, moves: Tensor, group: dict
) -> tuple[Tensor, float, Tensor | None]:
    """(F, s, W): the term is s F W Fᵀ for the left side, s Fᵀ W F for the right one."""
    length = stack.key.n if side == LEFT else stack.key.m
    other = OTHER[side]
    if group["statistic"] == "shampoo":
        return grad, 1, None
    if other not in stack.key.sides:
        return grad, 1 / length, None
    if group["statistic"] == "frobenius":
        return grad, 1, _power_weight(stack, other, grad, moves, group["shampoo_beta"])
    return _whitened(stack, other, grad, group), 1 / length, None


def _power_weight(stack: Stack, side: str, grad: Tensor, moves: Tensor, beta: float) -> Tensor:
    """W (B, d, d) = R / ‖R‖², R the bias-corrected statistic of `side` before this gradient."""
    statistic = stack.statistic[side]
    norm, start = matrix_norms(statistic), block_norms(grad)
    safe = torch.where(norm > 0, norm, 1)
    weight = statistic * per_block(bias(stack.steps - moves, beta) / safe / safe)
    eye = torch.eye(stack.dimension(side), dtype=stack.dtype, device=stack.device)
    first = eye * per_block(1 / torch.where(start > 0, start, 1))
    return torch.where(per_block(norm > 0), weight, first)


def _start_kl_(stack: Stack, grad: Tensor, moves: Tensor) -> None:
    """S <- rms(G)^(2 / number of factors) * I where there is no statistic yet: S_a S_b ~ ‖g‖²."""
    rms = _rms(stack, grad) ** (2 / len(stack.key.sides)) if stack.key.sides else moves
    for side in stack.key.sides:
        diagonal = stack.statistic[side].diagonal(dim1=-2, dim2=-1)
        diagonal.add_(torch.where(diagonal.sum(-1) == 0, rms * moves, 0)[:, None])


def _rms(stack: Stack, grad: Tensor) -> Tensor:
    return block_norms(grad) / math.sqrt(stack.key.m * stack.key.n)


def _whitened(stack: Stack, side: str, grad: Tensor, group: dict) -> Tensor:
    """G times an X with X Xᵀ = S^-1, S the statistic of `side` when it was last refreshed.

    The root itself with p = 2; in an eigenbasis Q it is Q / sqrt(values), and Qᵀ is left out, as
    the Gram product does not see it. Before the first refresh S = rms(G) I.
    """
    factor = stack.root[side].to(stack.dtype)
    if group["application"] == "soap":
        values = stack.extra[f"{side}_values"]
        ridge = group["ridge"] * values.amax(-1, keepdim=True)
        known = values.amax(-1) > 0
        factor = (
            factor
            * torch.where(known[:, None], (values.clamp(min=0) + ridge).rsqrt(), 1)[:, None, :]
        )
    else:
        known = factor[:, 0, 0] > 0
    left, right = (None, factor) if side == RIGHT else (factor.mT, None)
    result, _ = apply_factors(grad, left, right, group["precision"])
    rms = _rms(stack, grad)
    return torch.where(
        per_block(known), result, grad * per_block(torch.where(rms > 0, rms, 1).rsqrt())
    )


def _alignment(stack: Stack, grad: Tensor, precision: str) -> Tensor:
    """<G, L G R> / (‖L‖ ‖R‖) (B,)."""
    left, right = (
        A / per_block(torch.where(norm > 0, norm, 1))
        for A, norm in ((A, matrix_norms(A)) for A in stack.statistic.values())
    )
    result, _ = apply_factors(grad, left, right, precision)
    rows = torch.linalg.vecdot(result, grad.to(result.dtype), dim=-1)
    return rows.double().sum(-1).to(result.dtype)
