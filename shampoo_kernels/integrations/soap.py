"""SOAP by its authors (nikhilvyas/SOAP, one file `soap.py`) on these kernels.

    from shampoo_kernels.integrations import soap

    soap.enable()  # or for a while: with soap.enable(): ...

What changes (options, state and formulas stay the peer's):

- `update_preconditioner`: the statistics of all dimensions in one pass each, without the outer
  product, exactly symmetric.
- `project` and `project_back` of matrices: by `precondition`.

The eigenvectors and the QR step stay the peer's: `orthogonal_iteration` is no faster on a CPU.
Tensors other than float32 and float64 take the peer's own way, and so do vectors.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from shampoo_kernels.integrations._patching import Enabled, Integration, Replacement
from shampoo_kernels.integrations._stacks import MASTERS
from shampoo_kernels.ops.gram_ema import gram_ema_
from shampoo_kernels.ops.precondition import precondition

_Function = Callable[..., Any]


def _statistics(original: _Function) -> _Function:
    def update_preconditioner(
        self: Any,
        grad: Tensor,
        state: dict,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
    ) -> None:
        kept = [s for s in state["GG"] if len(s)]
        if grad.ndim == 1 or any(s.dtype not in MASTERS for s in kept):
            original(self, grad, state, max_precond_dim, merge_dims, precondition_1d)
            return
        options = {"merge_dims": merge_dims, "max_precond_dim": max_precond_dim}
        started, step = state["Q"] is not None, state["step"]
        if started:  # the momentum lives in the eigenbasis, which is about to change
            state["exp_avg"] = self.project_back(state["exp_avg"], state, **options)
        _accumulate(self.merge_dims(grad, max_precond_dim) if merge_dims else grad, state)
        if not started:
            state["Q"] = self.get_orthogonal_matrix(state["GG"])
        if step > 0:
            if step % state["precondition_frequency"] == 0:
                state["Q"] = self.get_orthogonal_matrix_QR(state, max_precond_dim, merge_dims)
            state["exp_avg"] = self.project(state["exp_avg"], state, **options)

    return update_preconditioner


def _accumulate(grad: Tensor, state: dict) -> None:
    beta = state["shampoo_beta"]
    for axis, statistic in enumerate(state["GG"]):
        if len(statistic):
            matrix = grad.movedim(axis, 0).reshape(len(statistic), -1).to(statistic.dtype)
            gram_ema_(statistic, matrix, beta, 1 - beta, side="left")


def _projection(back: bool) -> Callable[[_Function], _Function]:
    def make(original: _Function) -> _Function:
        def project(
            self: Any,
            grad: Tensor,
            state: dict,
            merge_dims: bool = False,
            max_precond_dim: int = 10000,
        ) -> Tensor:
            bases = [q for q in state["Q"] if len(q)]
            plain = grad.ndim == 2 and not merge_dims and bool(bases)
            if not plain or any(x.dtype != grad.dtype or x.dtype not in MASTERS for x in bases):
                return original(self, grad, state, merge_dims, max_precond_dim)
            left, right = (q if len(q) else None for q in state["Q"])
            if back:
                right = None if right is None else right.mT
            else:
                left = None if left is None else left.mT
            return precondition(grad, left, right)[0]

        return project

    return make


_PROJECT = "(self, grad, state, merge_dims=False, max_precond_dim=10000)"
INTEGRATION = Integration(
    "soap",
    (
        Replacement(
            "soap:SOAP",
            "update_preconditioner",
            _statistics,
            "(self, grad, state, max_precond_dim=10000, merge_dims=False, precondition_1d=False)",
        ),
        Replacement("soap:SOAP", "project", _projection(back=False), _PROJECT),
        Replacement("soap:SOAP", "project_back", _projection(back=True), _PROJECT),
    ),
)


def enable(*, any_version: bool = False) -> Enabled:
    """Put these kernels into SOAP, in this process: see `Integration.enable`.

    The peer has no versions: tested with commit a1e5535, and what is replaced is checked.
    """
    return INTEGRATION.enable(any_version=any_version)
