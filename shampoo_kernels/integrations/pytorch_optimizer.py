"""kozistr's pytorch_optimizer: DASH, ScalableShampoo, Shampoo and SOAP on these kernels.

    from shampoo_kernels.integrations import pytorch_optimizer

    pytorch_optimizer.enable()  # or for a while: with pytorch_optimizer.enable(): ...

What changes (options, state and formulas stay the peer's):

- DASH: statistics in one pass, the update by `precondition`. "eigh" by eigh, a block per core; one
  large block alone, for which LAPACK takes all cores, stays the peer's. "newton_db" gives the
  root that the peer's iteration goes to; ten of its steps stop far short of it from a condition
  number of 1e4 on, and `newton_steps` and `matrix_scaling` have no effect.
- ScalableShampoo: statistics in one pass; roots of all blocks of a size in one call. The ridge is
  `matrix_eps` times the largest eigenvalue as in the peer, by an iteration that draws no random
  numbers. A block that is not finite keeps its root.
- Shampoo: roots by eigh in place of an SVD.
- SOAP: statistics in one pass, projections of matrices by `precondition`. The QR step stays the
  peer's: `orthogonal_iteration` is no faster on a CPU.

Eigenvalues that are negative by rounding count as the unit of rounding times the bound. For Shampoo
and SOAP, tensors other than float32 and float64 take the peer's own way; so do, for Shampoo and
DASH's "eigh", matrices that are not finite, with the peer's exception.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shampoo_kernels.integrations import _dash
from shampoo_kernels.integrations._patching import Enabled, Integration, Replacement
from shampoo_kernels.integrations._stacks import (
    MASTERS,
    add_to_diagonal,
    by_shape,
    eigh_root,
    newton_root,
    solved_by_eigh,
)
from shampoo_kernels.ops.gram_ema import gram_ema_
from shampoo_kernels.ops.power_iteration import power_iteration
from shampoo_kernels.ops.precondition import precondition

VERSIONS = ("4.1.0",)
_PACKAGE = "pytorch_optimizer.optimizer"
_Function = Callable[..., Any]


def _svd_root(original: _Function) -> _Function:
    def compute_power_svd(matrix: Tensor, power: float) -> Tensor:
        # One that is rounded to 16 bits is too indefinite to have a root; an SVD takes it.
        solved = solved_by_eigh(matrix, power) if matrix.dtype in MASTERS else None
        return original(matrix, power) if solved is None else solved

    return compute_power_svd


def _scalable_roots(original: _Function) -> _Function:
    def compute_pre_conditioners(self: Any) -> None:
        p = self.exponent_for_pre_conditioner
        if self.is_same_shapes:
            self.pre_conditioners = _scalable_root(self, self.statistics, p, self.pre_conditioners)
            return
        for indices in by_shape(self.statistics):
            stack, old = (
                torch.stack([tensors[i] for i in indices])
                for tensors in (self.statistics, self.pre_conditioners)
            )
            roots = _scalable_root(self, stack, p, old).unbind()
            for i, root in zip(indices, roots, strict=True):
                self.pre_conditioners[i] = root.clone()  # not a view: it is saved alone

    return compute_pre_conditioners


def _scalable_root(preconditioner: Any, A: Tensor, p: int, previous: Tensor) -> Tensor:
    if preconditioner.use_svd:
        return eigh_root(A, p, previous)
    eps = preconditioner.matrix_eps
    largest = power_iteration(A, steps=30).clamp_min(1e-16)
    # Where half of 500 eigenvalues are equal and the others zero, the bound is ten times the
    # largest; a floor that is too low costs a few products and no accuracy.
    floor = min(max(eps / 16, 3e-8), 0.1)
    return newton_root(add_to_diagonal(A, eps * largest), p, floor, previous)


def _scalable_statistics(original: _Function) -> _Function:
    def add_statistics(self: Any, grad: Tensor) -> None:
        if len(self.statistics) == 0:
            return
        grad = grad.to(self.statistics[0].dtype).reshape(self.transformed_shape)
        axes = [i for i, selected in enumerate(self.should_precondition_dims) if selected]
        blocks = [(b, i) for b in self.partitioner.partition(grad) for i in axes]
        if self.is_same_shapes:
            stack = torch.stack([_unfold(*block) for block in blocks])
            gram_ema_(self.statistics, stack, self.beta2, self.w2, side="left")
            return
        for statistic, block in zip(self.statistics, blocks, strict=True):
            _gram_(statistic, *block, self.beta2, self.w2)

    return add_statistics


def _unfold(grad: Tensor, axis: int) -> Tensor:
    return grad.movedim(axis, 0).flatten(1)


def _gram_(statistic: Tensor, grad: Tensor, axis: int, beta: float, alpha: float) -> None:
    """The Gram matrix of one axis; the last needs no transposed copy."""
    if axis == grad.ndim - 1 > 0:
        gram_ema_(statistic, grad.reshape(-1, grad.shape[-1]), beta, alpha, side="right")
    else:
        gram_ema_(statistic, _unfold(grad, axis), beta, alpha, side="left")


def _soap_statistics(original: _Function) -> _Function:
    def update_pre_conditioner(
        self: Any,
        grad: Tensor,
        state: dict,
        step: int,
        max_precondition_dim: int = 10000,
        precondition_1d: bool = False,
        merge_dims: bool = False,
    ) -> None:
        statistics = state["GG"]
        if grad.ndim == 1 or any(len(s) and s.dtype not in MASTERS for s in statistics):
            options = (max_precondition_dim, precondition_1d, merge_dims)
            original(self, grad, state, step, *options)
            return
        beta = state["shampoo_beta"]
        merged = self.merge_dims(grad, max_precondition_dim) if merge_dims else grad
        for axis, statistic in enumerate(statistics):
            if len(statistic):
                _gram_(statistic, merged.to(statistic.dtype), axis, beta, 1 - beta)
        if state["Q"] is None:
            state["Q"] = self.get_orthogonal_matrix(statistics)
        if step > 0 and step % state["precondition_frequency"] == 0:
            state["Q"] = self.get_orthogonal_matrix_qr(state, max_precondition_dim, merge_dims)

    return update_pre_conditioner


def _soap_projection(original: _Function) -> _Function:
    def project(
        self: Any,
        grad: Tensor,
        state: dict,
        merge_dims: bool = False,
        max_precondition_dim: int = 10000,
        project_type: str = "forward",
    ) -> Tensor:
        bases = [q for q in state["Q"] if len(q)]
        matrices = grad.ndim == len(state["Q"]) == 2 and not merge_dims and bases
        if not matrices or any(x.dtype not in MASTERS for x in (grad, *bases)):
            options = (merge_dims, max_precondition_dim, project_type)
            return original(self, grad, state, *options)
        left, right = (q if len(q) else None for q in state["Q"])
        if project_type == "forward":
            left = None if left is None else left.mT
        else:
            right = None if right is None else right.mT
        return precondition(grad, left, right)[0]

    return project


INTEGRATION = Integration(
    "pytorch_optimizer",
    (
        Replacement(
            f"{_PACKAGE}.dash:DASH",
            "compute_inverse_root",
            _dash.inverse_root,
            "(self, matrix, root, group)",
        ),
        Replacement(
            f"{_PACKAGE}.dash:DASH",
            "update_block",
            _dash.update,
            "(self, grad, state, one_sided, group)",
        ),
        Replacement(
            f"{_PACKAGE}.utils.preconditioner:PreConditioner",
            "compute_pre_conditioners",
            _scalable_roots,
            "(self)",
        ),
        Replacement(
            f"{_PACKAGE}.utils.preconditioner:PreConditioner",
            "add_statistics",
            _scalable_statistics,
            "(self, grad)",
        ),
        Replacement(f"{_PACKAGE}.shampoo", "compute_power_svd", _svd_root, "(matrix, power)"),
        Replacement(
            f"{_PACKAGE}.soap:SOAP",
            "update_pre_conditioner",
            _soap_statistics,
            "(self, grad, state, step, max_precondition_dim=10000, precondition_1d=False, "
            "merge_dims=False)",
        ),
        Replacement(
            f"{_PACKAGE}.soap:SOAP",
            "project",
            _soap_projection,
            "(self, grad, state, merge_dims=False, max_precondition_dim=10000, "
            "project_type='forward')",
        ),
    ),
    distribution="pytorch-optimizer",
    versions=VERSIONS,
)


def enable(*, any_version: bool = False) -> Enabled:
    """Put these kernels into pytorch_optimizer, in this process: see `Integration.enable`."""
    return INTEGRATION.enable(any_version=any_version)
