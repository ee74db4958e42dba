"""Sampled gradients of one layer, and the few moments of them that every measurement is made of.

The gradients are kept in the dtype they come in; they are read a chunk at a time and computed with
in `dtype`. Nothing here is larger than they are: H = E[ggᵀ], (mn, mn), is never formed.
"""

import abc
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from shampoo_kernels.chooser import choose
from shampoo_kernels.ops import common, gram_ema

CHUNK = 1 << 20  # elements of one temporary: 8 MiB in float64


class Unmeasurable(ValueError):
    """Gradients, or a factor, that are zero everywhere or not finite: H has no direction."""


class Gradients(abc.ABC):
    """`count` gradients G (m, n) of one layer, known through moments; E is the mean over them.

    Every moment is that of G / scale, whose size is about 1: fourth powers of gradients would
    leave the range of a dtype. The moments of G itself are scale² times as large.
    """

    layer: str  # for messages
    shape: tuple[int, int]  # (m, n)
    count: int
    scale: float  # 0 where all gradients are zero, NaN or infinity where one is not finite
    dtype: torch.dtype  # of the computations, and of every moment
    device: torch.device
    kfac: tuple[Tensor, Tensor] | None  # E[δδᵀ] (m, m) and E[aaᵀ] (n, n), where they are known

    @abc.abstractmethod
    def left(self, right: Tensor | None) -> Tensor:
        """E[G R Gᵀ] (m, m) for any R (n, n), None: the identity; exactly symmetric where R is."""

    @abc.abstractmethod
    def right(self, left: Tensor | None) -> Tensor:
        """E[Gᵀ L G] (n, n) for any L (m, m), None: the identity; exactly symmetric where L is."""

    @abc.abstractmethod
    def inner(self, left: Tensor, right: Tensor) -> float:
        """<H, R⊗L> = E tr(Gᵀ L G Rᵀ)."""

    @abc.abstractmethod
    def squares(self, left: Tensor, right: Tensor) -> Tensor:
        """E[(LᵀGR)²], entry by entry, (m, n): the diagonal of H in the basis R⊗L."""

    @abc.abstractmethod
    def mean(self) -> Tensor:
        """E[G] (m, n)."""

    @abc.abstractmethod
    def values(self) -> Tensor:
        """The gradients themselves, (count, m, n), not divided by `scale`."""

    @abc.abstractmethod
    def _sum_of_pairs(self) -> float:
        """The sum of <G_b, G_b'>² over all pairs b, b', b = b' included."""

    @cached_property
    def norm(self) -> float:
        """‖H‖ in Frobenius norm, from ‖H‖² = E_{b,b'} <G_b, G_b'>²."""
        return self._sum_of_pairs() ** 0.5 / self.count

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Shampoo's own, E[GGᵀ] and E[GᵀG]: where everything begins."""
        return self.left(None), self.right(None)

    @cached_property
    def trace(self) -> float:
        """tr H = E‖G‖²."""
        return float(self.statistics[0].trace())

    def identities(self) -> tuple[Tensor, Tensor]:
        """I_m and I_n."""
        m, n = (torch.eye(k, dtype=self.dtype, device=self.device) for k in self.shape)
        return m, n


class DenseGradients(Gradients):
    """Gradients that are held as one tensor (N, m, n)."""

    def __init__(
        self,
        values: Tensor,
        *,
        layer: str = "",
        dtype: torch.dtype = torch.float64,
        kfac: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._values, self.layer, self.dtype, self.kfac = values, layer, dtype, kfac
        self.count, *shape = values.shape
        self.shape = (shape[0], shape[1])
        self.device = values.device
        self.scale = float(values.abs().max()) if values.numel() else 0.0

    def values(self) -> Tensor:
        return self._values

    def left(self, right: Tensor | None) -> Tensor:
        m, n = self.shape
        total = torch.zeros(m, m, dtype=self.dtype, device=self.device)
        if self._add_by_kernel_(total, right, transposed=False):
            return total
        for G in self._chunks():
            weighted = G if right is None else G.view(-1, n) @ right
            total.addmm_(weighted.view(m, -1), G.view(m, -1).mT, alpha=1 / self.count)
        return as_symmetric_as(right, total)

    def right(self, left: Tensor | None) -> Tensor:
        m, n = self.shape
        total = torch.zeros(n, n, dtype=self.dtype, device=self.device)
        if self._add_by_kernel_(total, left, transposed=True):
            return total
        for G in self._chunks():
            weighted = G if left is None else left.mT @ G.view(m, -1)
            total.addmm_(weighted.view(-1, n).mT, G.view(-1, n), alpha=1 / self.count)
        return as_symmetric_as(left, total)

    def inner(self, left: Tensor, right: Tensor) -> float:
        return float((left * self.left(right)).sum(dtype=torch.float64))

    def squares(self, left: Tensor, right: Tensor) -> Tensor:
        m, n = self.shape
        total = left.new_zeros(self.shape)
        for G in self._chunks():
            rotated = (left.mT @ G.view(m, -1)).view(-1, n) @ right
            total += rotated.view_as(G).square().sum(1)
        return total / self.count

    def mean(self) -> Tensor:
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for G in self._chunks():
            total += G.sum(1)
        return total / self.count

    def _add_by_kernel_(self, total: Tensor, weight: Tensor | None, *, transposed: bool) -> bool:
        """The same by the package's kernels, where they serve; they mirror one triangle."""
        backend = choose("kronecker_power_step", self.device.type, self.dtype)
        if backend == "reference" or not (weight is None or torch.equal(weight, weight.mT)):
            return False
        for chunk in self._parts():
            G = chunk.to(self.dtype) / self.scale
            grads = (G.mT if transposed else G).unsqueeze(0)
            weights = None if weight is None else weight.unsqueeze(0)
            gram_ema.accumulate_(
                total.unsqueeze(0), grads, weights, 1.0, 1 / self.count, backend=backend
            )
        return True

    def _sum_of_pairs(self) -> float:
        """From the Gram matrix of gradients or from H, whichever is smaller, a few rows at once."""
        flat = self._values.flatten(1)
        if flat.shape[0] > flat.shape[1]:
            flat = flat.mT
        total, rows = 0.0, max(1, CHUNK // max(flat.shape))
        for start, block in _split(flat, rows):
            block = block.to(self.dtype) / self.scale
            for other_start, other in _split(flat, rows):
                if other_start >= start:
                    gram = block @ (other.to(self.dtype) / self.scale).mT
                    total += float(gram.square().sum()) * (1 if other_start == start else 2)
        return total

    def _chunks(self) -> Iterator[Tensor]:
        """(m, b, n) of b gradients: as (m, b n) and as (m b, n) it goes into one product."""
        for part in self._parts():
            swapped = part.transpose(0, 1)
            yield (
                torch.empty(swapped.shape, dtype=self.dtype, device=self.device)
                .copy_(swapped)
                .div_(self.scale)
            )

    def _parts(self) -> Iterator[Tensor]:
        for _, part in _split(self._values, max(1, CHUNK // self._values[0].numel())):
            yield part


def as_gradients(op: str, grads: Tensor | Gradients) -> Gradients:
    """Gradients that `op` can measure; (N, m, n) tensors are measured in float64.

    Raises:
        TypeError, ValueError: another shape or dtype, nothing but zeros, or NaN or infinity; the
        message names the layer where it is known.
    """
    if not isinstance(grads, Gradients):
        common.check_tensors(op, grads=grads)
        common.check_dtype(op, "grads", grads, common.FLOATS)
        if grads.ndim != 3 or grads.numel() == 0:
            raise ValueError(
                f"{op}: grads must be (N, m, n), none of them 0, got {tuple(grads.shape)}"
            )
        grads = DenseGradients(grads)
    name = f'the gradient of layer "{grads.layer}"' if grads.layer else "grads"
    check_size(op, name, grads.scale)
    return grads


def check_size(op: str, name: str, largest: float) -> None:
    """Raise Unmeasurable; `largest` is the largest absolute entry, NaN where there is a NaN."""
    check_finite(op, name, largest)
    if largest == 0:
        raise Unmeasurable(
            f"{op}: {name} is zero everywhere: there is no cosine with a zero matrix"
        )


def check_finite(op: str, name: str, largest: float) -> None:
    if not largest < float("inf"):
        raise Unmeasurable(f"{op}: {name} must be finite, got NaN or infinity")


def _split(whole: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(whole), rows):
        yield start, whole[start : start + rows]


def as_symmetric_as(given: Tensor | None, made: Tensor) -> Tensor:
    """`made`, to the bit symmetric where `given` is; None is the identity."""
    symmetric = given is None or torch.equal(given, given.mT)
    return common.mirror_lower(made) if symmetric else made
