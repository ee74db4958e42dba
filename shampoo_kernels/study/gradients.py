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

CHUNK = 1 << 22  # elements of one temporary: 32 MiB in float64


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
    def left(self, right: Tensor) -> Tensor:
        """E[G R Gᵀ] (m, m) for any R (n, n); exactly symmetric where R is."""

    @abc.abstractmethod
    def right(self, left: Tensor) -> Tensor:
        """E[Gᵀ L G] (n, n) for any L (m, m); exactly symmetric where L is."""

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
    def trace(self) -> float:
        """tr H = E‖G‖²."""
        return float(self.left(self.identities()[1]).trace())

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

    def left(self, right: Tensor) -> Tensor:
        return self._half_step(right, transposed=False)

    def right(self, left: Tensor) -> Tensor:
        return self._half_step(left, transposed=True)

    def inner(self, left: Tensor, right: Tensor) -> float:
        return sum(float((G * (left @ G @ right.mT)).sum()) for G in self._chunks()) / self.count

    def squares(self, left: Tensor, right: Tensor) -> Tensor:
        total = left.new_zeros(self.shape)
        for G in self._chunks():
            total += (left.mT @ G @ right).square().sum(0)
        return total / self.count

    def mean(self) -> Tensor:
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for G in self._chunks():
            total += G.sum(0)
        return total / self.count

    def _half_step(self, weight: Tensor, *, transposed: bool) -> Tensor:
        size = self.shape[1] if transposed else self.shape[0]
        total = weight.new_zeros(size, size)
        symmetric = torch.equal(weight, weight.mT)  # the kernels mirror one triangle
        for chunk in self._chunks():
            G = chunk.mT if transposed else chunk
            if symmetric:
                backend = choose("kronecker_power_step", G.device.type, G.dtype)
                gram_ema.accumulate_(
                    total[None], G[None], weight[None], 1.0, 1 / self.count, backend=backend
                )
            else:
                total += _beside(G @ weight) @ _beside(G).mT / self.count
        return total

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
        for _, chunk in _split(self._values, max(1, CHUNK // self._values[0].numel())):
            yield chunk.to(self.dtype) / self.scale


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


def _beside(G: Tensor) -> Tensor:
    """(N, m, n) -> (m, N*n): the matrices side by side."""
    return G.transpose(0, 1).flatten(1)
