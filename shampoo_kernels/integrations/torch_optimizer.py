"""torch_optimizer's Shampoo: its roots by eigh in place of an SVD on the CPU.

    from shampoo_kernels.integrations import torch_optimizer

    torch_optimizer.enable()  # or for a while: with torch_optimizer.enable(): ...

Its exponent, -1/order, its epsilon and its state stay as they are. A matrix that is not finite
takes the peer's own way, to its exception.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from shampoo_kernels.integrations._patching import Enabled, Integration, Replacement
from shampoo_kernels.integrations._stacks import MASTERS, solved_by_eigh

VERSIONS = ("0.3.0",)


def _root(original: Callable[..., Any]) -> Callable[..., Any]:
    def _matrix_power(matrix: Tensor, power: float) -> Tensor:
        if power >= 0 or matrix.dtype not in MASTERS:
            return original(matrix, power)
        solved = solved_by_eigh(matrix, -1 / power)
        return original(matrix, power) if solved is None else solved

    return _matrix_power


INTEGRATION = Integration(
    "torch_optimizer",
    [Replacement("torch_optimizer.shampoo", "_matrix_power", _root, "(matrix, power)")],
    distribution="torch-optimizer",
    versions=VERSIONS,
)


def enable(*, any_version: bool = False) -> Enabled:
    """Put these kernels into torch_optimizer, in this process: see `Integration.enable`."""
    return INTEGRATION.enable(any_version=any_version)
