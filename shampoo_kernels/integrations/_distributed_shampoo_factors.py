"""Distributed Shampoo's factors: accumulated by stacks, packed and unpacked."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from shampoo_kernels.integrations._patching import UnsupportedPeer
from shampoo_kernels.integrations._stacks import MASTERS
from shampoo_kernels.ops.gram_ema import gram_ema_
from shampoo_kernels.ops.precondition import precondition

_Item = TypeVar("_Item")
_How = Callable[..., Any] | None
# Entries of a stack: 16 MiB in float32, so that what is held beside the peer's own state does not
# grow with the number of blocks, and still a few large blocks or all of the small ones at a time.
# The peer packs its factors: gram_ema_ writes squares, n² for n(n + 1)/2, which are then gathered.
_STACK = 1 << 22


class Part(NamedTuple):
    """Some blocks of one shape, of one of the peer's lists."""

    indices: Sequence[int]
    blocks: Sequence[Any]  # what the peer holds of each
    selector: tuple[bool, ...]
    sides: list[int]  # those with a factor, in the order of the block's factors

    def stack(self, grads: Sequence[Tensor]) -> Tensor:
        """(B, ...) of all gradients of the list."""
        return torch.stack([grads[i] for i in self.indices])


def by_shape(self: Any, grads: Sequence[Tensor]) -> Iterator[Part]:
    """The blocks of one of the peer's lists, with a gradient each."""
    selectors = self._masked_preconditioned_dims_selector_list
    groups: defaultdict[tuple, list[int]] = defaultdict(list)
    for i, (grad, selector) in enumerate(zip(grads, selectors, strict=True)):
        groups[grad.shape, selector, grad.dtype, grad.device].append(i)
    blocks = self._masked_kronecker_factors_unwrapped
    for (shape, selector, *_), members in groups.items():
        sides = [k for k, selected in enumerate(selector) if selected]
        entries = max([shape.numel(), *(shape[k] ** 2 for k in sides)])
        for part in chunks(members, entries, _STACK):
            yield Part(part, [blocks[i] for i in part], selector, sides)


def known_methods(name: str, **lists_of: _How) -> dict[Callable[..., Any], _How]:
    """What is done in place of a method of the peer's lists; other classes have their own."""
    from distributed_shampoo.preconditioner import shampoo_preconditioner_list as lists

    try:
        return {getattr(getattr(lists, kind), name): how for kind, how in lists_of.items()}
    except AttributeError as error:
        raise UnsupportedPeer(f"distributed_shampoo: tested with commit f606606; {error}") from None


def gram(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_update_factor_matrices` for blocks of one shape together: of the gradients, or (KL-Shampoo)
    of the gradients times the inverse roots of all other sides."""
    known = known_methods(
        "_compute_outer_product_list",
        BaseShampooPreconditionerList=None,
        RootInvKLShampooPreconditionerList=_stored,
        EigendecomposedKLShampooPreconditionerList=_from_eigenvectors,
    )

    @torch.compiler.disable
    def update_factor_matrices(self: Any, masked_grad_list: Sequence[Tensor]) -> None:
        method = type(self)._compute_outer_product_list
        if method not in known:
            original(self, masked_grad_list=masked_grad_list)
            return
        inverse = known[method]
        for part in by_shape(self, masked_grad_list):
            sides, count = part.sides, range(len(part.sides))
            if not sides:
                continue
            stack = part.stack(masked_grad_list)
            roots = [inverse(self, part.blocks, i) for i in count] if inverse else []
            for i in count:
                grads = stack
                if roots:
                    others = sides[:i] + sides[i + 1 :]
                    grads = multiplied(stack, others, roots[:i] + roots[i + 1 :])
                targets = [factors.factor_matrices[i] for factors in part.blocks]
                _accumulate(targets, grads, sides[i], self._beta2, self._weighting_factor)

    return update_factor_matrices


def _stored(self: Any, blocks: Sequence[Any], i: int) -> Tensor:
    """The inverse roots (B, n, n) of the i-th factors."""
    return unpack(stack_of(blocks, "inv_factor_matrices", i))


def _from_eigenvectors(self: Any, blocks: Sequence[Any], i: int) -> Tensor:
    from distributed_shampoo.preconditioner import shampoo_preconditioner_list as lists

    config = self._preconditioner_config.amortized_computation_config
    roots = [
        lists.matrix_inverse_root_from_eigendecomposition(
            L=factors.factor_matrices_eigenvalues[i],
            Q=factors.factor_matrices_eigenvectors[i],
            root=Fraction(factors.roots[i]),
            epsilon=self._epsilon,
            rank_deficient_stability_config=config.rank_deficient_stability_config,
        )
        for factors in blocks
    ]
    return _master(torch.stack(roots))


def stack_of(blocks: Sequence[Any], name: str, i: int) -> Tensor:
    """The i-th matrices of a kind, of every block, in float32 at least."""
    return _master(torch.stack([getattr(factors, name)[i] for factors in blocks]))


def _master(A: Tensor) -> Tensor:
    return A if A.dtype in MASTERS else A.float()


def multiplied(grads: Tensor, sides: Sequence[int], matrices: Sequence[Tensor]) -> Tensor:
    """Gradients (B, ...) times a matrix (B, n, n) on each of the sides, in float32 at least."""
    for side, matrix in zip(sides, matrices, strict=True):
        x = grads.movedim(side + 1, 1)
        x = x.double() if matrix.dtype == torch.float64 else x  # computed in its dtype
        y = precondition(x.flatten(2) if x.ndim > 2 else x.unsqueeze(2), matrix, None)[0]
        grads = y.reshape(x.shape).movedim(1, side + 1)
    return grads


def _accumulate(targets: list[Tensor], grads: Tensor, k: int, beta: float, weight: float) -> None:
    """factor <- beta factor + weight G_k G_kᵀ for the k-th side of gradients (B, ...)."""
    master = torch.float64 if grads.dtype == torch.float64 else torch.float32
    matrices = grads.movedim(k + 1, 1).flatten(2) if grads.ndim > 2 else grads.unsqueeze(2)
    size = matrices.shape[1]
    stat = grads.new_empty(len(targets), size, size, dtype=master)
    gram_ema_(stat, matrices, 0.0, weight, side="left")
    update = pack(stat, targets[0].ndim == 1).to(targets[0].dtype)
    if beta != 1.0:
        torch._foreach_mul_(targets, beta)
    torch._foreach_add_(targets, list(update.unbind()))


def pack(A: Tensor, packed: bool) -> Tensor:
    """(B, n, n) -> the rows of the upper triangles (B, n(n+1)/2), where the peer packs them."""
    if not packed:
        return A
    rows, columns = _triangle(A.shape[-1], A.device)
    return A[:, rows, columns]


def unpack(A: Tensor) -> Tensor:
    """(B, n, n) from that, or from what is not packed."""
    if A.ndim == 3:
        return A
    n = side_of(A[0])
    full = A.new_empty(len(A), n, n)
    rows, columns = _triangle(n, A.device)
    full[:, rows, columns] = A
    full[:, columns, rows] = A
    return full


def side_of(factor: Tensor) -> int:
    """n of one factor, packed (n(n+1)/2,) or not (n, n)."""
    return len(factor) if factor.ndim == 2 else (math.isqrt(1 + 8 * len(factor)) - 1) // 2


@functools.lru_cache(maxsize=64)
def _triangle(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(n, n, device=device)
    return rows, columns


def chunks(items: Sequence[_Item], entries: int, most: int) -> Iterator[Sequence[_Item]]:
    """Pieces of at most `most` entries, at so many an item, and of at least one item."""
    size = max(1, most // max(entries, 1))
    for start in range(0, len(items), size):
        yield items[start : start + size]
