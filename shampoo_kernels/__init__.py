"""Kernels for Shampoo-type optimizers: Gram statistics, inverse roots, Kronecker power steps."""

from shampoo_kernels.chooser import backends, use_backend
from shampoo_kernels.ops.eigenvalue_bound import eigenvalue_bound
from shampoo_kernels.ops.gram_ema import gram_ema_
from shampoo_kernels.ops.inverse_root import InverseRoot, RootStatus, inverse_root
from shampoo_kernels.ops.kronecker_power_step import kronecker_power_step
from shampoo_kernels.ops.orthogonal_iteration import orthogonal_iteration
from shampoo_kernels.ops.orthogonalize import orthogonalize
from shampoo_kernels.ops.power_iteration import power_iteration
from shampoo_kernels.ops.precondition import precondition
from shampoo_kernels.optim.groups import split_params
from shampoo_kernels.optim.memory import state_bytes
from shampoo_kernels.optim.shampoo import Shampoo
from shampoo_kernels.schedules import minimax_coefficients

__version__ = "0.1.0"

__all__ = [
    "InverseRoot",
    "RootStatus",
    "Shampoo",
    "backends",
    "eigenvalue_bound",
    "gram_ema_",
    "inverse_root",
    "kronecker_power_step",
    "minimax_coefficients",
    "orthogonal_iteration",
    "orthogonalize",
    "power_iteration",
    "precondition",
    "split_params",
    "state_bytes",
    "use_backend",
]
