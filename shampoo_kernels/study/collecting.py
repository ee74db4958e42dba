"""Where the gradients of one layer go, chunk by chunk: dense, or as factors where that is less."""

import torch
from torch import Tensor

from shampoo_kernels.study.factored import FactoredGradients
from shampoo_kernels.study.gradients import DenseGradients, Gradients, check_finite
from shampoo_kernels.study.layers import Layer


class Collector:
    """Gradients of one layer, `examples` examples of K gradients each, in memory made once."""

    def __init__(self, layer: Layer, examples: int, max_bytes: int) -> None:
        self.layer, self.examples, self.max_bytes = layer, examples, max_bytes
        self.next = 0  # the first example that is not there yet
        self._values: Tensor | None = None  # (N, K, m, n)
        self._factors: tuple[Tensor, Tensor] | None = None  # (N, K, T, m) and (N, T, n)
        self._kfac: tuple[Tensor, Tensor] | None = None

    def add(self, grads: Tensor) -> None:
        """grads (N', K, *weight.shape)."""
        grads = grads.detach().flatten(3)
        if self._values is None:
            self._values = self._allocate(grads)
        self._values[self.next : self.next + len(grads)] = grads
        self.next += len(grads)

    def add_factors(self, delta: Tensor, act: Tensor) -> None:
        """delta (N', K, T, m), act (N', T, n). What makes a pair of gradients cheaper is kept."""
        (_, atoms, positions, m), n = delta.shape, act.shape[-1]
        sums = [factor.flatten(0, -2).double() for factor in (delta, act)]
        new = [factor.mT @ factor for factor in sums]
        old = self._kfac or [torch.zeros_like(each) for each in new]
        self._kfac = (
            old[0] + new[0] / (self.examples * atoms), old[1] + new[1] / self.examples
        )  # fmt: skip
        if positions**2 * (m + n / atoms) > m * n:
            self.add(torch.einsum("bktm,btn->bkmn", delta, act))
            return
        if self._factors is None:
            self._factors = self._allocate(delta), self._allocate(act)
        for whole, part in zip(self._factors, (delta, act), strict=True):
            whole[self.next : self.next + len(part)] = part
        self.next += len(act)

    def gradients(self, dtype: torch.dtype) -> Gradients:
        made: Gradients
        if self._factors is not None:
            made = FactoredGradients(
                *self._factors, layer=self.layer.name, dtype=dtype, kfac=self._kfac
            )
        else:
            assert self._values is not None
            values = self._values.flatten(0, 1)
            made = DenseGradients(values, layer=self.layer.name, dtype=dtype, kfac=self._kfac)
        check_finite("sample", f'the gradient of layer "{self.layer.name}"', made.scale)
        return made

    def _allocate(self, part: Tensor) -> Tensor:
        shape = (self.examples, *part.shape[1:])
        size = part.element_size() * torch.Size(shape).numel()
        if size > self.max_bytes:
            raise ValueError(
                f'sample: the gradients of layer "{self.layer.name}", {shape}, take '
                f"{size / 2**30:.1f} GiB, more than max_bytes = {self.max_bytes / 2**30:.1f} GiB: "
                "give fewer inputs"
            )
        return part.new_empty(shape)
