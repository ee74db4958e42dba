"""Distributed Shampoo's updates: gradients of one shape are multiplied together."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo_kernels.integrations._distributed_shampoo_factors import (
    by_shape,
    chunks,
    known_methods,
    multiplied,
    stack_of,
    unpack,
)
from shampoo_kernels.ops.orthogonalize import orthogonalize

_ORTHOGONALIZED = 1 << 24  # entries of a stack; the steps need about five of them
_NORM = 10.0  # the peer divides by at least 1e-8 where `orthogonalize` does by at least 1e-7


def preconditioned(original: Callable[..., Any]) -> Callable[..., Any]:
    """`precondition` of the lists whose blocks hold what to multiply by."""
    known = known_methods(
        "_compute_preconditioned_gradient",
        RootInvShampooPreconditionerList=_by_roots,
        EigenvalueCorrectedShampooPreconditionerList=_in_eigenbasis,
    )

    @torch.compiler.disable
    def precondition(self: Any, masked_grad_list: Sequence[Tensor]) -> tuple[Tensor, ...]:
        update = known.get(type(self)._compute_preconditioned_gradient)
        if update is None:
            return original(self, masked_grad_list)
        results = list(masked_grad_list)
        for part in by_shape(self, masked_grad_list):
            if not part.sides:  # what the peer returns may be the gradient itself
                for i, block in zip(part.indices, part.blocks, strict=True):
                    results[i] = self._compute_preconditioned_gradient(
                        masked_grad_list[i], part.selector, block
                    )
                continue
            stack = part.stack(masked_grad_list)
            updates = update(self, stack, part.blocks, part.sides).to(stack.dtype)
            for i, result in zip(part.indices, updates.unbind(), strict=True):
                results[i] = result
        return tuple(results)

    return precondition


def _by_roots(self: Any, grads: Tensor, blocks: Sequence[Any], sides: Sequence[int]) -> Tensor:
    roots = [unpack(stack_of(blocks, "inv_factor_matrices", i)) for i in range(len(sides))]
    return multiplied(grads, sides, roots)


def _in_eigenbasis(self: Any, grads: Tensor, blocks: Sequence[Any], sides: Sequence[int]) -> Tensor:
    """There, divided by the root of the corrected eigenvalues, and back."""
    bases = _bases(blocks, sides)
    rotated = multiplied(grads, sides, [Q.mT for Q in bases])
    eigenvalues = torch.stack([factors.corrected_eigenvalues for factors in blocks])
    root = blocks[0].roots[0]  # of all blocks of one order
    denominators = eigenvalues.div(self._bias_correction2).pow_(1 / root).add_(self._epsilon)
    return multiplied(rotated / denominators, sides, bases)


def _bases(blocks: Sequence[Any], sides: Sequence[int]) -> list[Tensor]:
    return [stack_of(blocks, "factor_matrices_eigenvectors", i) for i in range(len(sides))]


def corrected(original: Callable[..., Any]) -> Callable[..., Any]:
    """`update_preconditioners` of eigenvalue-corrected Shampoo: eigenvalue <- beta eigenvalue +
    weight (entry of the gradient in the eigenbasis)², after all that other lists do."""
    from distributed_shampoo.preconditioner import shampoo_preconditioner_list as lists

    @torch.compiler.disable
    def square(self: Any, masked_grad_list: Sequence[Tensor]) -> None:
        for part in by_shape(self, masked_grad_list):
            bases = [Q.mT for Q in _bases(part.blocks, part.sides)]
            rotated = multiplied(part.stack(masked_grad_list), part.sides, bases)
            for block, x in zip(part.blocks, rotated.unbind(), strict=True):
                if self._beta2 != 1.0:
                    block.corrected_eigenvalues.mul_(self._beta2)
                x = x.to(block.corrected_eigenvalues.dtype)
                block.corrected_eigenvalues.addcmul_(x, x, value=self._weighting_factor)

    def update_preconditioners(
        self: Any,
        masked_grad_list: Sequence[Tensor],
        step: Tensor,
        perform_amortized_computation: bool,
    ) -> None:
        lists.BaseShampooPreconditionerList.update_preconditioners(
            self, masked_grad_list, step, perform_amortized_computation
        )
        square(self, masked_grad_list)

    return update_preconditioners


def orthogonalized(original: Callable[..., Any]) -> Callable[..., Any]:
    """`precondition` of spectral descent, where it iterates."""
    from distributed_shampoo.preconditioner import matrix_functions_types as types

    @torch.compiler.disable
    def precondition(self: Any, masked_grad_list: Sequence[Tensor]) -> tuple[Tensor, ...]:
        config = self._preconditioner_config.orthogonalization_config
        if (
            type(config) is not types.NewtonSchulzOrthogonalizationConfig
            or config.num_iterations < 1
        ):
            return original(self, masked_grad_list)
        groups = defaultdict(list)
        for i, grad in enumerate(masked_grad_list):
            groups[grad.shape, grad.dtype, grad.device].append(i)
        results = list(masked_grad_list)
        for (shape, dtype, _), members in groups.items():
            scale = config.scale_by_dims_fn(shape[1], shape[0])
            for part in chunks(members, shape.numel(), _ORTHOGONALIZED):
                G = torch.stack([masked_grad_list[i] for i in part])
                G = G.to(torch.float64 if dtype == torch.float64 else torch.float32).mul_(_NORM)
                X = orthogonalize(G, coefficients=config.coefficients, steps=config.num_iterations)
                for i, x in zip(part, X.mul_(scale).to(dtype).unbind(), strict=True):
                    results[i] = x
        return tuple(results)

    return precondition
