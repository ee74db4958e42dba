"""Meta's Distributed Shampoo (facebookresearch/optimizers) on these kernels.

    from shampoo_kernels.integrations import distributed_shampoo

    distributed_shampoo.enable()  # or for a while: with distributed_shampoo.enable(): ...

`DistributedShampoo`, its options, its state and its distribution (SingleDeviceDistributedConfig,
DDPDistributedConfig, FSDPDistributedConfig, HSDPDistributedConfig, FullyShardDistributedConfig and
HybridShardDistributedConfig) stay: every rank does what follows with the blocks that it holds, all
blocks of one shape at a time. What is not replaced runs as it is. By preconditioner_config:

                            roots or bases    factors    updates
RootInvShampoo              see below         replaced   replaced
RootInvKLShampoo            see below         replaced   replaced
EigendecomposedShampoo      the peer's (1)    replaced   the peer's (2)
EigendecomposedKLShampoo    the peer's (1)    replaced   the peer's (2)
EigenvalueCorrectedShampoo  the peer's (1)    replaced   replaced
SpectralDescent             none              none       NewtonSchulzOrthogonalization replaced,
                                                         SVDOrthogonalization the peer's (3)
SignDescent, SGD, AdaGrad,  none              none       the peer's, entry by entry
RMSprop, Adam

and by amortized_computation_config, for the roots:

Eigen, Perturbation         eigh on a CPU, the Newton iteration on a GPU, eigh where it fails
Eigen, PseudoInverse        eigh; the peer's with rank_atol, which is absolute
Eigen with offloading       the peer's
CoupledNewton,              the Newton iteration; the peer's for roots that are no integers
CoupledHigherOrder
EighEigendecomposition,     the peer's (1)
QREigendecomposition
KernelRootInv               these kernels by name, with damping relative to the largest eigenvalue,
                            which rank-deficient factors in float32 want

(1) eigh is the same library's either way. `orthogonal_iteration` lifts the null space, in float32
    by up to an eighth of the largest eigenvalue: it is not the iteration that the peer does.
(2) Made of the eigenvectors anew in every step, which no kernel here does.
(3) What the null space becomes is not defined, and theirs and ours differ there.

Roots are damped as the peer damps. What is not finite or not solved goes the peer's own way, factor
by factor, with its warnings, its exceptions and its count of tolerated failures. One host
synchronisation per list and refresh is left. Sums are in float32 or better whatever the dtypes of
gradients and factors. Subclasses of the peer's lists that have their own formulas keep them.
"""

import dataclasses
import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from shampoo_kernels.integrations._distributed_shampoo_config import (
    Call,
    call_for,
    kernel_config,
    root_of,
)
from shampoo_kernels.integrations._distributed_shampoo_factors import (
    chunks,
    gram,
    pack,
    side_of,
    unpack,
)
from shampoo_kernels.integrations._distributed_shampoo_updates import (
    corrected,
    orthogonalized,
    preconditioned,
)
from shampoo_kernels.integrations._patching import (
    Enabled,
    Integration,
    Replacement,
    UnsupportedPeer,
)
from shampoo_kernels.integrations._versions import check_if_installed

VERSIONS = ("1.0.0",)  # of torch-shampoo, at commit f606606
_PACKAGE = "distributed_shampoo.preconditioner"
_Function = Callable[..., Any]
_ROOTS = 1 << 25  # entries of a stack of factors: 128 MiB in float32, and a root takes six of them


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
    for (_, root, *_), members in groups.items():
        block = blocks[members[0][0]]  # of one list: options are those of all
        factor = block.factor_matrices[members[0][1]]
        n, dtype = side_of(factor), factor.dtype
        call = call_for(block.amortized_computation_config, Fraction(root), block.epsilon, dtype, n)
        if call is None:
            unsolved.update(b for b, _ in members)
            continue
        for part in chunks(members, n * n, _ROOTS):
            results.append((part, *_solve(blocks, part, Fraction(root), call, bias_correction)))
    unsolved |= _write(blocks, results)
    for b, block in enumerate(blocks):
        if b in unsolved:
            block.amortized_computation(bias_correction2=bias_correction)
        else:
            block._failed_amortized_computation_counter = 0


def _solve(
    blocks: Sequence[Any], part: Sequence[tuple[int, int]], root: Fraction, call: Call,
    bias_correction: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Roots as the blocks store them, and which of them are good."""
    block, i = blocks[part[0][0]], part[0][1]
    A = torch.stack([blocks[b].factor_matrices[i] for b, i in part])
    A = unpack(A / bias_correction)
    if block.use_trace_scaling:
        trace = A.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=block.epsilon)
        A = A * (trace**-block.trace_scaling_exponent)[:, None, None]
    roots, solved = root_of(A, root, call)
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
_UPDATE = "(self, masked_grad_list, step, perform_amortized_computation)"
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
            _UPDATE,
        ),
        Replacement(
            f"{_LISTS}:EigenvalueCorrectedShampooPreconditionerList",
            "update_preconditioners",
            corrected,
            _UPDATE,
        ),
        Replacement(
            f"{_LISTS}:BaseShampooPreconditionerList",
            "precondition",
            preconditioned,
            "(self, masked_grad_list)",
        ),
        Replacement(
            f"{_PACKAGE}.spectral_descent_preconditioner_list:SpectralDescentPreconditionerList",
            "precondition",
            orthogonalized,
            "(self, masked_grad_list)",
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
