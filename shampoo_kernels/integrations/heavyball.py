"""HeavyBall: its SOAP and KL-Shampoo families on these kernels.

    from shampoo_kernels.integrations import heavyball

    heavyball.enable()  # or for a while: with heavyball.enable(): ...

What changes, for parameters that HeavyBall sees as matrices: the statistics (`update_ggt`, and
`update_ggt_kl` with the other side's inverse as its weight) are updated in one pass, projections
into the eigenbases and back (`project`) go through `precondition`. Tensors other than float32 and
float64, other ranks and error-correcting storage take the peer's own way.

The QR step, `get_orthogonal_matrix_QR`, stays the peer's: it lifts the null space and fixes the
signs as `orthogonal_iteration` does, which is no faster on a CPU. On a machine without a compiler
set `heavyball.utils.compile_mode = None`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo_kernels.integrations._patching import Enabled, Integration, Replacement
from shampoo_kernels.integrations._stacks import MASTERS
from shampoo_kernels.ops.gram_ema import gram_ema_
from shampoo_kernels.ops.precondition import precondition

VERSIONS = ("3.2.1",)
_Function = Callable[..., Any]
_SIDES = ("left", "right")


def _plain(*tensors: Tensor | None) -> bool:
    """Are these of one dtype that the kernels take, with nothing kept beside them?"""
    given = [x for x in tensors if x is not None]
    return len({x.dtype for x in given}) == 1 and all(
        x.dtype in MASTERS and not hasattr(x, "_ecc") for x in given
    )


def _statistics(original: _Function) -> _Function:
    def update_ggt(
        grad: Tensor,
        GG: Sequence[Tensor | None],
        max_precond_dim: int,
        precondition_1d: bool,
        beta: float | Tensor,
    ) -> None:
        if grad.ndim != 3 or len(GG) != 2 or not _plain(grad, *GG):
            original(grad, GG, max_precond_dim, precondition_1d, beta)
            return
        for statistic, side in zip(GG, _SIDES, strict=True):
            if statistic is not None:
                gram_ema_(statistic, grad, beta, 1 - beta, side=side)

    return update_ggt


def _kl_statistics(original: _Function) -> _Function:
    def update_ggt_kl(
        grad: Tensor,
        GG: Sequence[Tensor | None],
        Q: Sequence[Tensor | None],
        max_precond_dim: int,
        precondition_1d: bool,
        beta: float | Tensor,
        eps: float,
        *,
        heavy: bool = False,
    ) -> None:
        statistics, bases = ([x for x in kept if x is not None] for kept in (GG, Q))
        both = len(GG) == len(Q) == len(statistics) == len(bases) == 2
        if grad.ndim != 3 or not both or not _plain(grad, *statistics, *bases):
            original(grad, GG, Q, max_precond_dim, precondition_1d, beta, eps, heavy=heavy)
            return
        left, right = (
            _whitening(*pair, eps, heavy) for pair in zip(statistics, bases, strict=True)
        )
        # sum_k (G q_k) (G q_k)ᵀ / (n λ_k) on the left, where q and λ are the right side's.
        weighted = precondition(grad, None, right)[0], precondition(grad, left.mT, None)[0]
        for statistic, part, side in zip(statistics, weighted, _SIDES, strict=True):
            gram_ema_(statistic, part, beta, 1 - beta, side=side)

    return update_ggt_kl


def _whitening(A: Tensor, Q: Tensor, eps: float, heavy: bool) -> Tensor:
    """Q diag(n λ)^(-1/2) (B, n, n), λ the diagonal of QᵀAQ; below eps: eps, or nothing if heavy."""
    values = _values(Q, A)
    scale = values.clamp_min(eps).mul_(A.shape[-1]).rsqrt_()
    if heavy:
        scale = torch.where(values > eps, scale, 0.0)
    return Q * scale.unsqueeze(-2)


def _values(Q: Tensor, A: Tensor) -> Tensor:
    """The diagonal of QᵀAQ (B, n)."""
    return torch.linalg.vecdot(Q, precondition(Q, A, None)[0], dim=-2)


def _eigenvalues(original: _Function) -> _Function:
    def _kl_eigvals(q: Tensor, m: Tensor) -> Tensor:
        return _values(q, m) if q.ndim == 3 and _plain(q, m) else original(q, m)

    return _kl_eigvals


def _projection(original: _Function) -> _Function:
    def project(grad: Tensor, Q: Sequence[Tensor | None], back: bool) -> Tensor:
        if grad.ndim != 3 or len(Q) != 2 or Q[0] is Q[1] is None or not _plain(grad, *Q):
            return original(grad, Q, back)
        left, right = Q
        if back:
            right = None if right is None else right.mT
        else:
            left = None if left is None else left.mT
        return precondition(grad, left, right)[0]

    return project


_UTILS = "heavyball.utils"
INTEGRATION = Integration(
    "heavyball",
    (
        Replacement(
            _UTILS, "update_ggt", _statistics, "(grad, GG, max_precond_dim, precondition_1d, beta)"
        ),
        Replacement(
            _UTILS,
            "update_ggt_kl",
            _kl_statistics,
            "(grad, GG, Q, max_precond_dim, precondition_1d, beta, eps, *, heavy=False)",
        ),
        Replacement(_UTILS, "_kl_eigvals", _eigenvalues, "(q, m)"),
        Replacement(_UTILS, "project", _projection, "(grad, Q, back)"),
    ),
    distribution="heavyball",
    versions=VERSIONS,
)


def enable(*, any_version: bool = False) -> Enabled:
    """Put these kernels into HeavyBall, in this process: see `Integration.enable`."""
    return INTEGRATION.enable(any_version=any_version)
