"""Distributed Shampoo's factors: accumulated by stacks, packed and unpacked."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from shampoo_kernels.ops.gram_ema import gram_ema_

_Item = TypeVar("_Item")
_CHUNK = 1 << 25  # entries of a stack: 128 MiB in float32, and a root needs about six of them


def gram(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_update_factor_matrices` for blocks of one shape together."""

    @torch.compiler.disable
    def update_factor_matrices(self: Any, masked_grad_list: Sequence[Tensor]) -> None:
        from distributed_shampoo.preconditioner import shampoo_preconditioner_list as lists

        plain = lists.BaseShampooPreconditionerList._compute_outer_product_list
        if type(self)._compute_outer_product_list is not plain:
            original(self, masked_grad_list=masked_grad_list)
            return
        blocks = zip(
            masked_grad_list,
            self._masked_preconditioned_dims_selector_list,
            self._masked_kronecker_factors_unwrapped,
            strict=True,
        )
        groups = defaultdict(list)
        for grad, selector, factors in blocks:
            if factors.factor_matrices:
                dtypes = grad.dtype, factors.factor_matrices[0].dtype
                groups[grad.shape, selector, *dtypes, grad.device].append((grad, factors))
        for (shape, selector, *_), members in groups.items():
            sides = [k for k, selected in enumerate(selector) if selected]
            largest = max(shape[k] for k in sides)
            for part in chunks(members, largest**2):
                _accumulate(part, sides, self._beta2, self._weighting_factor)

    return update_factor_matrices


def _accumulate(
    members: Sequence[tuple[Tensor, Any]], sides: Sequence[int], beta: float, weight: float
) -> None:
    """factor <- beta factor + weight G_k G_kᵀ for each side k of gradients of one shape."""
    grads = torch.stack([grad for grad, _ in members])
    master = torch.float64 if grads.dtype == torch.float64 else torch.float32
    for index, k in enumerate(sides):
        matrices = grads.movedim(k + 1, 1).flatten(2) if grads.ndim > 2 else grads.unsqueeze(2)
        size = matrices.shape[1]
        stat = grads.new_empty(len(members), size, size, dtype=master)
        gram_ema_(stat, matrices, 0.0, weight, side="left")
        targets = [factors.factor_matrices[index] for _, factors in members]
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


def unpack(A: Tensor, n: int) -> Tensor:
    """(B, n, n) from that, or from what is not packed."""
    if A.ndim == 3:
        return A
    full = A.new_empty(len(A), n, n)
    rows, columns = _triangle(n, A.device)
    full[:, rows, columns] = A
    full[:, columns, rows] = A
    return full


@functools.lru_cache(maxsize=64)
def _triangle(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(n, n, device=device)
    return rows, columns


def chunks(items: Sequence[_Item], entries: int) -> Iterator[Sequence[_Item]]:
    """Pieces of at most _CHUNK entries, at so many an item, and of at least one item."""
    size = max(1, _CHUNK // max(entries, 1))
    for start in range(0, len(items), size):
        yield items[start : start + size]
