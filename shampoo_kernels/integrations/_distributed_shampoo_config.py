"""The config by which a user of Distributed Shampoo asks for these kernels."""

import functools
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor

from shampoo_kernels.integrations._stacks import add_to_diagonal
from shampoo_kernels.ops.inverse_root import RootStatus, inverse_root


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
