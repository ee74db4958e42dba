"""The Adagrad view: the gradients of a training run, and their running or decaying covariance."""

import torch
from torch import Tensor

from shampoo_kernels.ops import common
from shampoo_kernels.study.gradients import DenseGradients, Gradients

_NEGLIGIBLE = 1e-6  # share of the newest gradient's weight below which an old one is dropped


class GradientHistory:
    """Past gradients of one layer with weights: H = sum_t β^(T-t) g_t g_tᵀ over their sum.

    beta=1 is Adagrad's running sum and keeps every gradient: memory grows with the steps. Below 1
    it is an exponential moving average, and gradients are dropped when their weight is below 1e-6.

    Raises ValueError: beta outside (0, 1].
    """

    def __init__(self, beta: float = 1.0, *, layer: str = "") -> None:
        if not 0 < beta <= 1:
            raise ValueError(f"GradientHistory: beta must be above 0 and at most 1, got {beta}")
        self.beta, self.layer = beta, layer
        self._past: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._past)

    def append(self, grad: Tensor) -> None:
        """Copy one gradient (m, *), kept as the matrix G.flatten(1)."""
        common.check_tensors("GradientHistory", grad=grad)
        matrix = grad.detach().flatten(1).clone()
        if self._past and matrix.shape != self._past[0].shape:
            raise ValueError(
                f"GradientHistory: grad must be {tuple(self._past[0].shape)} as those before, "
                f"got {tuple(matrix.shape)}"
            )
        self._past.append(matrix)
        if self.beta ** (len(self._past) - 1) < _NEGLIGIBLE:
            del self._past[0]

    def gradients(self, dtype: torch.dtype = torch.float64) -> Gradients:
        """The gradients, scaled by the square roots of their weights: the plain E[ggᵀ] is H.

        Raises ValueError: there is none yet.
        """
        if not self._past:
            raise ValueError(f'GradientHistory: layer "{self.layer}" has no gradient yet')
        values = torch.stack(self._past)
        if self.beta < 1:
            ages = torch.arange(len(values) - 1, -1, -1, device=values.device)
            weights = self.beta ** ages.double()
            scales = (weights * len(weights) / weights.sum()).sqrt()
            values = values * scales.to(values.dtype)[:, None, None]
        return DenseGradients(values, layer=self.layer, dtype=dtype)
