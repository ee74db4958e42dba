"""What Distributed Shampoo's configs ask of `inverse_root`, and the config that names it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_kernels.integrations._stacks import MASTERS, add_to_diagonal
from shampoo_kernels.ops.inverse_root import RootStatus, inverse_root

# The smallest eigenvalue, relative to the bound, that iterations are made for: the peer's damping
# is absolute, so that nothing is known of it before. The least that float32 bears.
_FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12}


class Call(NamedTuple):
    """What `inverse_root` is asked for, and what is added to the diagonal: a number, or (B,)."""

    options: dict[str, Any]
    damping: Callable[[Tensor], float | Tensor]


def call_for(
    config: Any, root: Fraction, epsilon: float, dtype: torch.dtype, n: int
) -> Call | None:
    """For one of the peer's configs; None where the peer does it alone."""
    from distributed_shampoo.preconditioner import matrix_functions_types as types

    if dtype not in MASTERS or root <= 0 or n == 0:
        return None
    newton = {"ridge": 0.0, "design_floor": _FLOOR[dtype], "method": "newton"}
    has_iteration = root.denominator == 1 and root <= 64
    if type(config) is kernel_config():
        return Call(config.options(), lambda A: epsilon)
    if type(config) is types.EigenConfig and not config.eigendecomposition_offload_device:
        return _eigen(config.rank_deficient_stability_config, epsilon, dtype, n)
    if type(config) is types.CoupledNewtonConfig and has_iteration:
        return Call(newton, lambda A: epsilon)
    if type(config) is types.CoupledHigherOrderConfig and has_iteration:
        relative, absolute = config.rel_epsilon, config.abs_epsilon  # epsilon is not used there
        return Call(
            newton, lambda A: (relative * torch.linalg.matrix_norm(A, torch.inf)).clamp(absolute)
        )
    return None


def _eigen(stability: Any, epsilon: float, dtype: torch.dtype, n: int) -> Call | None:
    from distributed_shampoo.preconditioner import matrix_functions_types as types

    if type(stability) is types.PerturbationConfig:
        # Added before or after the decomposition it is the same matrix. The peer also shifts away
        # negative eigenvalues: those of rounding come out as its unit here, others unsolved.
        options = {"ridge": 0.0, "design_floor": _FLOOR[dtype], "fallback": "eigh"}
        return Call(options, lambda A: epsilon)
    if type(stability) is types.PseudoInverseConfig and epsilon == stability.rank_atol == 0:
        rtol = stability.rank_rtol
        rtol = n * torch.finfo(dtype).eps if rtol is None else rtol
        if 0 <= rtol < 1:
            return Call({"ridge": 0.0, "method": "eigh", "rank_rtol": rtol}, lambda A: 0.0)
    return None


def root_of(A: Tensor, root: Fraction, call: Call) -> tuple[Tensor, Tensor]:
    """(A + damping I)^(-1/root) (B, n, n), and which blocks are solved (B,)."""
    p = int(root) if root.denominator == 1 else root
    result = inverse_root(add_to_diagonal(A, call.damping(A)), p, **call.options)
    return result.root, result.status <= RootStatus.FELL_BACK


@functools.cache
def kernel_config() -> Any:
    """The class KernelRootInvConfig; a subclass of the peer's, which is imported here."""
    from distributed_shampoo.preconditioner.matrix_functions_types import RootInvConfig

    @dataclass(kw_only=True)
    class KernelRootInvConfig(RootInvConfig):
        """(A + (epsilon + ridge*bound) I)^(-1/root) by `shampoo_kernels.inverse_root`.

        epsilon is DistributedShampoo's; the others are as in `inverse_root`, and so are their
        defaults. An ArithmeticError, which DistributedShampoo tolerates as often as it is told to,
        where a factor is not finite, too indefinite, or the method does not converge on it.
        """

        ridge: float = 1e-6
        design_floor: float | None = None
        method: str = "auto"
        precision: str = "highest"
        rank_rtol: float | None = None
        fallback: str = "previous"

        def options(self) -> dict[str, Any]:
            """For `inverse_root`."""
            return dict(vars(self))

        def compute(self, A: Tensor, root: Fraction, epsilon: float) -> Tensor:
            """The root of one matrix (n, n)."""
            return _compute(A, root, epsilon, self.options())

    # Where pickle finds it: the module's attribute of this name.
    KernelRootInvConfig.__module__ = "shampoo_kernels.integrations.distributed_shampoo"
    KernelRootInvConfig.__qualname__ = KernelRootInvConfig.__name__
    return KernelRootInvConfig


def _compute(A: Tensor, root: Fraction, epsilon: float, options: dict[str, Any]) -> Tensor:
    if A.ndim != 2 or A.shape[0] != A.shape[1]:
        raise ValueError(f"KernelRootInvConfig: A must be (n, n), got {tuple(A.shape)}")
    p = int(root) if root.denominator == 1 else root
    result = inverse_root(add_to_diagonal(A, epsilon), p, **options)
    if result.status > RootStatus.FELL_BACK:
        raise ArithmeticError(
            f"KernelRootInvConfig: no inverse root of a {len(A)} x {len(A)} factor: "
            f"{RootStatus(int(result.status)).name}, residual {float(result.residual):.2g}"
        )
    return result.root
