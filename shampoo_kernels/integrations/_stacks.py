"""What the peers' replacements share: roots in the peers' own damping, many matrices at once."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_kernels.ops.inverse_root import RootStatus, inverse_root

MASTERS = (torch.float32, torch.float64)


def newton_root(A: Tensor, p: float, floor: float = 1e-6, previous: Tensor | None = None) -> Tensor:
    """A^(-1/p) (*, n, n), nothing added to A, for peers that iterate.

    In float32 Newton too, which is several times as accurate as float32 eigh, for eigenvalues from
    `floor` times the bound up; blocks with smaller ones, and float64, by eigh.
    """
    if A.dtype == torch.float64 or p != int(p) or p > 64:
        return eigh_root(A, p, previous)
    return inverse_root(
        A, p, ridge=0, design_floor=floor, method="newton", fallback="eigh", previous=previous
    ).root


def eigh_root(A: Tensor, p: float, previous: Tensor | None = None) -> Tensor:
    """A^(-1/p) (*, n, n), nothing added to A, for peers that decompose; negative eigenvalues, which
    are rounding, count as the unit of rounding times the bound."""
    return inverse_root(A, p, ridge=0, method="eigh", previous=previous).root


def solved_by_eigh(A: Tensor, p: float) -> Tensor | None:
    """`eigh_root`, or None where a block has no root, being NaN, Inf or indefinite: there the
    peers' own decompositions raise, or do as they do. One host synchronisation, as eigh has."""
    result = inverse_root(A, p, ridge=0, method="eigh")
    return result.root if bool((result.status <= RootStatus.FELL_BACK).all()) else None


def better_by_all_cores(A: Tensor) -> bool:
    """Is torch.linalg.eigh, whose LAPACK takes all cores for one block, faster than a core per
    block? For one block alone of more than 128: 1.4 to 1.5 times on two cores; for two, 0.5 to 0.8
    (n = 160 to 640, two Zen 5 cores, 2026-11-25)."""
    alone = A.device.type == "cpu" and A.shape[0] == 1 and A.shape[-1] > 128
    return alone and torch.get_num_threads() > 1


def add_to_diagonal(A: Tensor, value: float | Tensor) -> Tensor:
    """A + value*I as a new tensor; value: a number, or (*,) for A (*, n, n)."""
    A = A.clone()
    shift = value.unsqueeze(-1) if isinstance(value, Tensor) else value
    A.diagonal(dim1=-2, dim2=-1).add_(shift)
    return A


def by_shape(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The indices of equal shapes together, so that one call serves them all."""
    groups = defaultdict(list)
    for i, tensor in enumerate(tensors):
        groups[tensor.shape].append(i)
    return list(groups.values())
