"""Meta's Distributed Shampoo (facebookresearch/optimizers) on these kernels.

    from shampoo_kernels.integrations import distributed_shampoo

    distributed_shampoo.enable()  # or for a while: with distributed_shampoo.enable(): ...

`DistributedShampoo`, its options, its state and all its distributed variants stay. What changes:

- RootInvShampoo and RootInvKLShampoo: one call per size and root for all blocks of a parameter
  group, not one per factor. EigenConfig asks for eigh on a CPU and for the Newton iteration on a
  GPU (eigh where that does not converge), CoupledNewtonConfig and CoupledHigherOrderConfig with an
  integer root for the iteration; each damps as the peer does. What is not finite or not solved goes
  the peer's own way, factor by factor, with its warnings, its exceptions and its count of tolerated
  failures. One host synchronisation per group and refresh is left.
- All but KL-Shampoo: factors of equally shaped blocks are accumulated together, in float32 or
  better, whatever the gradients' dtype, into the packed triangles.

`KernelRootInvConfig` is a config for preconditioner_config that names these kernels and damps
relative to the largest eigenvalue, which rank-deficient factors in float32 want.
"""

import dataclasses
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_kernels.integrations._distributed_shampoo_config import kernel_config
from shampoo_kernels.integrations._distributed_shampoo_factors import chunks, gram, pack, unpack
from shampoo_kernels.integrations._patching import (
    Enabled,
    Integration,
    Replacement,
    UnsupportedPeer,
)
from shampoo_kernels.integrations._stacks import MASTERS, add_to_diagonal
from shampoo_kernels.integrations._versions import check_if_installed
from shampoo_kernels.ops.inverse_root import RootStatus, inverse_root

VERSIONS = ("1.0.0",)  # of torch-shampoo, at commit f606606
_PACKAGE = "distributed_shampoo.preconditioner"
_Function = Callable[..., Any]
# The smallest eigenvalue, relative to the bound, that iterations are made for: the peer's damping
# is absolute, so that nothing is known of it before. The least that float32 bears.
_FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12}


class _Call(NamedTuple):
    """What `inverse_root` is asked for, and what is added to the diagonal: a number, or (B,)."""

    options: dict[str, Any]
    damping: Callable[[Tensor], float | Tensor]


def _call(config: Any, root: Fraction, epsilon: float, dtype: torch.dtype, n: int) -> _Call | None:
    """For one of the peer's configs; None where the peer does it alone."""
    from distributed_shampoo.preconditioner import matrix_functions_types as types

    if dtype not in MASTERS or root <= 0 or n == 0:
        return None
    newton = {"ridge": 0.0, "design_floor": _FLOOR[dtype], "method": "newton"}
    has_iteration = root.denominator == 1 and root <= 64
    if type(config) is kernel_config():
        return _Call(config.options(), lambda A: epsilon)
    if type(config) is types.EigenConfig and not config.eigendecomposition_offload_device:
        return _eigen(config.rank_deficient_stability_config, epsilon, dtype, n)
    if type(config) is types.CoupledNewtonConfig and has_iteration:
        return _Call(newton, lambda A: epsilon)
    if type(config) is types.CoupledHigherOrderConfig and has_iteration:
        relative, absolute = config.rel_epsilon, config.abs_epsilon  # epsilon is not used there
        return _Call(
            newton, lambda A: (relative * torch.linalg.matrix_norm(A, torch.inf)).clamp(absolute)
        )
    return None


def _eigen(stability: Any, epsilon: float, dtype: torch.dtype, n: int) -> _Call | None:
    from distributed_shampoo.preconditioner import matrix_functions_types as types

    if type(stability) is types.PerturbationConfig:
        # Added before or after the decomposition it is the same matrix. The peer also shifts away
        # negative eigenvalues: those of rounding come out as its unit here, others unsolved.
        options = {"ridge": 0.0, "design_floor": _FLOOR[dtype], "fallback": "eigh"}
        return _Call(options, lambda A: epsilon)
    if type(stability) is types.PseudoInverseConfig and epsilon == stability.rank_atol == 0:
        rtol = stability.rank_rtol
        rtol = n * torch.finfo(dtype).eps if rtol is None else rtol
        if 0 <= rtol < 1:
            return _Call({"ridge": 0.0, "method": "eigh", "rank_rtol": rtol}, lambda A: 0.0)
    return None


def _root(A: Tensor, root: Fraction, call: _Call) -> tuple[Tensor, Tensor]:
    """(A + damping I)^(-1/root) (B, n, n), and which blocks are solved (B,)."""
    p = int(root) if root.denominator == 1 else root
    result = inverse_root(add_to_diagonal(A, call.damping(A)), p, **call.options)
    return result.root, result.status <= RootStatus.FELL_BACK


def _batched(original: _Function) -> _Function:
    _check_fields()

    def update_preconditioners(
        self: Any,
        masked_grad_list: Sequence[Tensor],
        step: Tensor,
        perform_amortized_computation: bool,
    ) -> None:
        original(self, masked_grad_list, step, False)
        if perform_amortized_computation:
            _refresh(self._masked_kronecker_factors_unwrapped, self._bias_correction2)

    return update_preconditioners


def _check_fields() -> None:
    """What is read of the peer's blocks, beside the functions that are replaced."""
    from distributed_shampoo.preconditioner import shampoo_preconditioner_list as lists

    needed = {
        "factor_matrices", "inv_factor_matrices", "roots", "epsilon", "use_symmetric_packing",
        "use_trace_scaling", "trace_scaling_exponent", "amortized_computation_config",
        "_failed_amortized_computation_counter",
    }  # fmt: skip
    block = lists.RootInvShampooKroneckerFactorsUnwrapped
    if missing := needed - {field.name for field in dataclasses.fields(block)}:
        raise UnsupportedPeer(
            f"distributed_shampoo: tested with commit f606606; {block.__name__} here has no "
            f"{', '.join(sorted(missing))}"
        )


@torch.compiler.disable
def _refresh(blocks: Sequence[Any], bias_correction: Tensor) -> None:
    """What every block's `amortized_computation` does, on stacks of equal factors."""
    groups: defaultdict[tuple, list[tuple[int, int]]] = defaultdict(list)
    unsolved: set[int] = set()
    for b, block in enumerate(blocks):
        for i, factor in enumerate(block.factor_matrices):
            dtypes = factor.dtype, block.inv_factor_matrices[i].dtype
            groups[factor.shape, block.roots[i], *dtypes, factor.device].append((b, i))
    results = []
    for (shape, root, *_), members in groups.items():
        block = blocks[members[0][0]]  # of one list: options are those of all
        n = shape[0] if len(shape) == 2 else (math.isqrt(1 + 8 * shape[0]) - 1) // 2
        dtype = block.factor_matrices[members[0][1]].dtype
        call = _call(block.amortized_computation_config, Fraction(root), block.epsilon, dtype, n)
        if call is None:
            unsolved.update(b for b, _ in members)
            continue
        for part in chunks(members, n * n):
            results.append((part, *_solve(blocks, part, n, Fraction(root), call, bias_correction)))
    unsolved |= _write(blocks, results)
    for b, block in enumerate(blocks):
        if b in unsolved:
            block.amortized_computation(bias_correction2=bias_correction)
        else:
            block._failed_amortized_computation_counter = 0


def _solve(
    blocks: Sequence[Any], part: Sequence[tuple[int, int]], n: int, root: Fraction, call: _Call,
    bias_correction: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Roots as the blocks store them, and which of them are good."""
    block, i = blocks[part[0][0]], part[0][1]
    A = torch.stack([blocks[b].factor_matrices[i] for b, i in part])
    A = unpack(A / bias_correction, n)
    if block.use_trace_scaling:
        trace = A.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=block.epsilon)
        A = A * (trace**-block.trace_scaling_exponent)[:, None, None]
    roots, solved = _root(A, root, call)
    roots = pack(roots, block.use_symmetric_packing).to(block.inv_factor_matrices[i].dtype)
    return roots, solved & roots.isfinite().flatten(1).all(1)


def _write(
    blocks: Sequence[Any], results: Sequence[tuple[Sequence[tuple[int, int]], Tensor, Tensor]]
) -> set[int]:
    """Copy the good roots to where they belong; the blocks that have others."""
    unsolved: set[int] = set()
    flags = iter(torch.cat([solved for *_, solved in results]).tolist() if results else [])
    for part, roots, _ in results:
        targets, sources = [], []
        for (b, i), root in zip(part, roots, strict=True):
            if next(flags):
                targets.append(blocks[b].inv_factor_matrices[i])
                sources.append(root)
            else:
                unsolved.add(b)
        if targets:
            torch._foreach_copy_(targets, sources)
    return unsolved


def _alone(original: _Function) -> _Function:
    """`matrix_inverse_root` with a KernelRootInvConfig too."""
    expected = ["A", "root", "root_inv_config", "epsilon"]
    if (found := list(inspect.signature(original).parameters)) != expected:
        raise UnsupportedPeer(
            f"distributed_shampoo: tested with commit f606606; matrix_inverse_root must take "
            f"{expected}, it takes {found}"
        )

    def matrix_inverse_root(
        A: Tensor, root: Fraction, root_inv_config: Any = None, epsilon: float = 0.0
    ) -> Tensor:
        if type(root_inv_config) is not kernel_config():
            options = {} if root_inv_config is None else {"root_inv_config": root_inv_config}
            return original(A, root, epsilon=epsilon, **options)
        return root_inv_config.compute(A, root, epsilon)

    return matrix_inverse_root


_LISTS = f"{_PACKAGE}.shampoo_preconditioner_list"
INTEGRATION = Integration(
    "distributed_shampoo",
    (
        Replacement(
            f"{_LISTS}:BaseShampooPreconditionerList",
            "_update_factor_matrices",
            gram,
            "(self, masked_grad_list)",
        ),
        Replacement(
            f"{_LISTS}:RootInvShampooPreconditionerList",
            "update_preconditioners",
            _batched,
            "(self, masked_grad_list, step, perform_amortized_computation)",
        ),
        Replacement(_LISTS, "matrix_inverse_root", _alone),
        Replacement(f"{_PACKAGE}.matrix_functions", "matrix_inverse_root", _alone),
    ),
)


def enable(*, any_version: bool = False) -> Enabled:
    """Put these kernels into Distributed Shampoo, in this process: see `Integration.enable`."""
    if not any_version:
        check_if_installed("distributed_shampoo", "torch-shampoo", VERSIONS)
    return INTEGRATION.enable(any_version=any_version)


def __getattr__(name: str) -> Any:
    if name == "KernelRootInvConfig":  # a subclass of the peer's, which is imported for it
        return kernel_config()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
