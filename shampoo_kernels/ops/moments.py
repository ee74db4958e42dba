"""Momentum and second moments of the blocks of many tensors, and the step of the method that they
belong to (the graft), in one call; not a public op.

Blocks are counted over all stacks; numbers of each block are tensors (blocks,).
"""

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_kernels.ops import common, pack
from shampoo_kernels.ops.norms import block_norms, per_block

_OP = "moments_"
GRAFTS = ("adam", "rmsprop", "adagrad", "sgd", None)


class Rule(NamedTuple):
    """m <- m + (1 - beta1)(G - m), v <- v + (1 - beta2)(G² - v), for "adagrad" v <- v + G².

    The graft's own step is lr * root_bias / bias1 * T with T = m / (sqrt(v) + eps * root_bias), the
    momentum m as it is, with `nesterov` as it would be if this gradient came once more:
    "adam" and None: root_bias = sqrt(1 - beta2^steps), "rmsprop" and "adagrad": 1, "sgd": T = m.

    Sources: arXiv 1711.05101 (AdamW); grafting: arXiv 2002.11803, 2002.09018.
    """

    betas: tuple[float, float]
    eps: float
    graft: str | None
    nesterov: bool

    def root_bias(self, steps: Tensor) -> Tensor:
        """(blocks,), by gradients seen."""
        plain = self.graft in ("rmsprop", "adagrad", "sgd")
        return torch.ones_like(steps) if plain else bias(steps, self.betas[1]).sqrt()

    def momentum_bias(self, steps: Tensor) -> Tensor:
        """(blocks,): what the momentum is to be divided by."""
        return bias(steps + 1 if self.nesterov else steps, self.betas[0])


class Entry(NamedTuple):
    """A stack of b blocks, as `moments_` takes it."""

    exp_avgs: Sequence[Tensor]  # b pieces (m, n), any strides, of the dtype of the gradients
    exp_avg_sqs: Sequence[Tensor] | None  # likewise, of the same strides; None: no squares
    grad: Tensor  # (b, m, n), contiguous, float32 or float64, finite
    wanted: bool  # whether its T is, not its norms alone


class Averages(NamedTuple):
    """What came of the entries, stack by stack."""

    momenta: list[Tensor]  # (b, m, n)
    own: list[Tensor]  # T (b, m, n), where it was not wanted the momentum
    squared_norms: Tensor  # (blocks,) float64, of T


def moments_(entries: Sequence[Entry], moves: Tensor, steps: Tensor, rule: Rule) -> Averages:
    """Take the gradients into the averages of the blocks that move, and look what step comes of it.

    Args:
        entries: stacks of at least one block each, on one device, of one dtype.
        moves: (blocks,) of that dtype, 1, or 0: everything of this block stays, bit for bit.
        steps: (blocks,) of that dtype, the gradients seen, these included.

    Raises:
        TypeError: something of an entry has another dtype than moves; ValueError: a gradient that
        is not contiguous, averages of one block with different strides.
    """
    for entry in entries:
        _check(entry, moves)
    if pack.native(moves):
        return _by_kernel(entries, moves, steps, rule)
    momenta, own, norms = [], [], [moves.new_empty(0)]
    sizes = [len(entry.exp_avgs) for entry in entries]
    for entry, move, step in zip(entries, moves.split(sizes), steps.split(sizes), strict=True):
        exp_avg, exp_avg_sq = torch.stack(list(entry.exp_avgs)), None
        momentum = average_(exp_avg, entry.grad, move, rule)
        torch._foreach_copy_(list(entry.exp_avgs), exp_avg.unbind())
        if entry.exp_avg_sqs is not None:
            exp_avg_sq = torch.stack(list(entry.exp_avg_sqs))
            average_squares_(exp_avg_sq, entry.grad, move, rule)
            torch._foreach_copy_(list(entry.exp_avg_sqs), exp_avg_sq.unbind())
        momenta.append(momentum)
        T = direction(momentum, exp_avg_sq, step, rule)
        own.append(T if entry.wanted else momentum)
        norms.append(block_norms(T))
    return Averages(momenta, own, torch.cat(norms).double().square())


def _by_kernel(entries: Sequence[Entry], moves: Tensor, steps: Tensor, rule: Rule) -> Averages:
    """One call for all, by a table of MomentPiece (kernels.h)."""
    momenta = [torch.empty_like(entry.grad) for entry in entries]
    own: list[Tensor] = []
    numbers, sizes = array("q"), list[int]()
    for entry, momentum in zip(entries, momenta, strict=True):
        squares, grad = entry.exp_avg_sqs, entry.grad
        count, m, n = grad.shape
        size = m * n * grad.element_size()
        step = torch.empty_like(grad) if entry.wanted and squares is not None else None
        own.append(momentum if step is None else step)
        starts = [0 if x is None else x.data_ptr() for x in (grad, momentum, step)]
        for i, average in enumerate(entry.exp_avgs):
            square, strides = 0, average.stride()
            if squares is not None:
                square = squares[i].data_ptr()
                if squares[i].stride() != strides and not _alike(average, squares[i]):
                    _refuse(f"exp_avg_sqs must have the strides {strides} of exp_avgs",
                            squares[i])  # fmt: skip
            places = (start and start + i * size for start in starts)
            numbers.extend((average.data_ptr(), square, *places, m, n, *strides))
        sizes += [m * n] * count
    plain = rule.graft in ("rmsprop", "adagrad", "sgd") or rule.betas[1] == 1
    squared_norms = torch.ops.shampoo_kernels_native.moments_(
        pack.on_device(numbers, 9, moves.device), pack.chunks(tuple(sizes), moves.device),
        moves, steps, *rule.betas, rule.eps, rule.nesterov, rule.graft == "adagrad", not plain,
    )  # fmt: skip
    return Averages(momenta, own, squared_norms)


def _check(entry: Entry, moves: Tensor) -> None:
    common.check_dtype(_OP, "grad", entry.grad, (moves.dtype,))
    for average in (*entry.exp_avgs[:1], *(entry.exp_avg_sqs or ())[:1]):
        common.check_dtype(_OP, "an average", average, (moves.dtype,))
    if not entry.grad.is_contiguous():
        _refuse("grad must be contiguous", entry.grad)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Strides of a dimension of size 1 mean nothing."""
    sizes = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size <= 1 or own == other for size, own, other in sizes)


def _refuse(expected: str, x: Tensor) -> None:
    raise ValueError(f"{_OP}: {expected}, got strides {x.stride()}")


def average_(exp_avg: Tensor, grad: Tensor, moves: Tensor, rule: Rule) -> Tensor:
    """Take grad (b, m, n) into exp_avg where moves (b,) is 1; returns the momentum (b, m, n).

    Where it is 0 the block keeps its average bit for bit; `grad` must be finite there too.
    """
    share = per_block(moves * (1 - rule.betas[0]))
    exp_avg.lerp_(grad, share)
    return exp_avg.lerp(grad, share) if rule.nesterov else exp_avg


def average_squares_(exp_avg_sq: Tensor, grad: Tensor, moves: Tensor, rule: Rule) -> None:
    """Take grad² (b, m, n) into exp_avg_sq where moves (b,) is 1, as `average_`."""
    if rule.graft == "adagrad":
        exp_avg_sq.addcmul_(grad.square(), per_block(moves))
    else:
        exp_avg_sq.lerp_(grad.square(), per_block(moves * (1 - rule.betas[1])))


def direction(momentum: Tensor, exp_avg_sq: Tensor | None, steps: Tensor, rule: Rule) -> Tensor:
    """T (b, m, n); without second moments it is the momentum itself."""
    if exp_avg_sq is None:
        return momentum
    denominator = exp_avg_sq.sqrt().add_(per_block(rule.eps * rule.root_bias(steps)))
    return torch.div(momentum, denominator, out=denominator)


def bias(steps: Tensor, beta: float) -> Tensor:
    """1 - beta^steps (b,) without cancellation; a block before its first step counts as after.

    1 for beta = 1, where the average is a sum.
    """
    if beta == 1:
        return torch.ones_like(steps)
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return -torch.expm1(steps.clamp(min=1) * log_beta)
