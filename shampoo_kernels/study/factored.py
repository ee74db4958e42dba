"""Gradients kept as the factors that a linear layer or a convolution makes them of."""

from collections.abc import Iterator

import torch
from torch import Tensor

from shampoo_kernels.study import gradients
from shampoo_kernels.study.gradients import Gradients, as_symmetric_as


class FactoredGradients(Gradients):
    """G_{bk} = sum_t δ_{bkt} a_{bt}ᵀ: N examples, K gradients of each, T positions, no G held.

    δ is the gradient of the loss by the layer's output, a the layer's input. T is 1 for a linear
    layer on vectors. The K gradients of one example share a.

    Args:
        delta: (N, K, T, m); act: (N, T, n); one float dtype.
    """

    def __init__(
        self,
        delta: Tensor,
        act: Tensor,
        *,
        layer: str = "",
        dtype: torch.dtype = torch.float64,
        kfac: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._delta, self._act = delta, act
        self.layer, self.dtype, self.kfac = layer, dtype, kfac
        self.shape = (delta.shape[-1], act.shape[-1])
        self.count = delta.shape[0] * delta.shape[1]
        self.device = delta.device
        self._scales = float(delta.abs().max()), float(act.abs().max())
        self.scale = self._scales[0] * self._scales[1]

    def values(self) -> Tensor:
        return torch.einsum("bktm,btn->bkmn", self._delta, self._act).flatten(0, 1)

    def left(self, right: Tensor | None) -> Tensor:
        total = torch.zeros(self.shape[0], self.shape[0], dtype=self.dtype, device=self.device)
        for delta, act in self._chunks():
            weighted = (_times(act, right) @ act.mT).unsqueeze(1) @ delta  # (N, K, T, m)
            total += delta.flatten(0, 2).mT @ weighted.flatten(0, 2)
        return as_symmetric_as(right, total / self.count)

    def right(self, left: Tensor | None) -> Tensor:
        total = torch.zeros(self.shape[1], self.shape[1], dtype=self.dtype, device=self.device)
        for delta, act in self._chunks():
            weighted = (_times(delta, left) @ delta.mT).sum(1) @ act  # (N, T, n)
            total += act.flatten(0, 1).mT @ weighted.flatten(0, 1)
        return as_symmetric_as(left, total / self.count)

    def inner(self, left: Tensor, right: Tensor) -> float:
        total = 0.0
        for delta, act in self._chunks():
            total += float(((delta @ left @ delta.mT).sum(1) * (act @ right @ act.mT)).sum())
        return total / self.count

    def squares(self, left: Tensor, right: Tensor) -> Tensor:
        total = left.new_zeros(self.shape)
        rank_one = self._act.shape[1] == 1
        rows_made = 0 if rank_one else self._delta.shape[1] * self.shape[0]
        for delta, act in self._chunks(rows_made):
            delta, act = delta @ left, act @ right
            if rank_one:  # (δ aᵀ)² is the product of the squares
                total += delta.square().sum((1, 2)).mT @ act.square().sum(1)
            else:
                total += torch.einsum("bktm,btn->bkmn", delta, act).square().sum((0, 1))
        return total / self.count

    def mean(self) -> Tensor:
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for delta, act in self._chunks():
            total += delta.sum(1).flatten(0, 1).mT @ act.flatten(0, 1)
        return total / self.count

    def _sum_of_pairs(self) -> float:
        """<G, G'> = sum over t, t' of (δ_t · δ'_t') (a_t · a'_t'); blocks of pairs of examples."""
        examples, atoms, positions, _ = self._delta.shape
        rows = max(1, int(gradients.CHUNK**0.5) // (atoms * positions))
        total = 0.0
        for start in range(0, examples, rows):
            delta, act = self._block(start, rows)
            for other in range(start, examples, rows):
                other_delta, other_act = self._block(other, rows)
                deltas = delta.flatten(0, 2) @ other_delta.flatten(0, 2).mT
                acts = act.flatten(0, 1) @ other_act.flatten(0, 1).mT
                shape = (len(delta), 1, positions, len(other_delta), 1, positions)
                deltas = deltas.view(*shape[:1], atoms, *shape[2:4], atoms, positions)
                gram = (deltas * acts.view(shape)).sum((2, 5))
                total += float(gram.square().sum()) * (1 if other == start else 2)
        return total

    def _chunks(self, rows_made: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """rows_made: how many vectors of length n, besides act, are made of one example."""
        _, atoms, positions, m = self._delta.shape
        size = max(atoms * positions * (m + positions), (positions + rows_made) * self.shape[1])
        rows = max(1, gradients.CHUNK // size)
        for start in range(0, len(self._delta), rows):
            yield self._block(start, rows)

    def _block(self, start: int, rows: int) -> tuple[Tensor, Tensor]:
        delta, act = (
            whole[start : start + rows].to(self.dtype) / scale
            for whole, scale in zip((self._delta, self._act), self._scales, strict=True)
        )
        return delta, act


def _times(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x @ weight
