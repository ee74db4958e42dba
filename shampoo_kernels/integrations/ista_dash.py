"""DASH of IST-DASLab (ista_daslab_optimizers) on these kernels.

    from shampoo_kernels.integrations import ista_dash

    ista_dash.enable()  # or for a while: with ista_dash.enable(): ...

Its root invertors, which DashGpu and DashLayerwise share (options and state stay the peer's):

- EVD with the heuristics SHAMPOO (the peer's default) and ABS_ADD: eigh, with the peer's eps, which
  SHAMPOO adds twice. ABS and RELU stay the peer's, and on a CPU with several cores one large block
  alone.
- CN and NDB: the root that the peer's iteration goes to, from a start that is not random, for every
  block by itself. Ten of its steps stop far short of it from a condition number of 1e4 on, and
  `newton_steps`, `matrix_scaling_*`, `cn_tolerance` and `matmul_dtype` have no effect.

Blocks that the kernels do not solve (one host synchronisation asks) get the peer's own method, and
so do other dtypes than float32 and float64. Chebyshev stays the peer's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shampoo_kernels.integrations._patching import (
    Enabled,
    Integration,
    Replacement,
)
from shampoo_kernels.integrations._stacks import MASTERS, add_to_diagonal, better_by_all_cores
from shampoo_kernels.integrations._versions import check_if_installed
from shampoo_kernels.ops.inverse_root import RootStatus, inverse_root

VERSIONS = ("1.1.15",)  # at commit 4c98e6e
_PACKAGE = "ista_daslab_optimizers.dash.invertors"
_ROOTS = (2, 4)  # others the peer refuses
_Function = Callable[..., Any]


def _decomposed(original: _Function) -> _Function:
    def matrix_root_inv_evd(inp: Tensor, out: Tensor, cfg: Any, root: int) -> Any:
        times = {"SHAMPOO": 2, "ABS_ADD": 1}.get(cfg.evd_heuristic.name)
        if times is None or inp.dtype not in MASTERS or better_by_all_cores(inp):
            return original(inp, out, cfg, root)
        return _invert(original, inp, out, cfg, root, times * cfg.eps_inv_root, {"method": "eigh"})

    return matrix_root_inv_evd


def _iterated(original: _Function) -> _Function:
    def matrix_root_inv(inp: Tensor, out: Tensor, cfg: Any, root: int) -> Any:
        if root not in _ROOTS or inp.dtype not in MASTERS:
            return original(inp, out, cfg, root)
        options: dict[str, Any] = {"method": "eigh"}
        if inp.dtype == torch.float32:  # several times as accurate as float32 eigh
            options = {"method": "newton", "design_floor": 1e-7, "fallback": "eigh"}
        return _invert(original, inp, out, cfg, root, cfg.eps_inv_root, options)

    return matrix_root_inv


def _invert(
    original: _Function, inp: Tensor, out: Tensor, cfg: Any, root: int, eps: float,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """out <- (inp + eps I)^(-1/root), (N, B, B)."""
    result = inverse_root(add_to_diagonal(inp.detach(), eps), root, ridge=0, **options)
    solved = result.status <= RootStatus.FELL_BACK
    if not solved.all():
        rest = torch.empty_like(result.root[~solved])
        original(inp[~solved], rest, cfg, root)
        result.root[~solved] = rest
    out.copy_(result.root)


_PARAMETERS = "(inp, out, cfg, root)"
INTEGRATION = Integration(
    "ista_dash",
    (
        Replacement(
            f"{_PACKAGE}.inv_evd:DashRootInvEVD", "_matrix_root_inv_evd", _decomposed, _PARAMETERS
        ),
        Replacement(
            f"{_PACKAGE}.inv_cn:DashRootInvCoupledNewton",
            "_matrix_root_inv_coupled_newton",
            _iterated,
            _PARAMETERS,
        ),
        Replacement(
            f"{_PACKAGE}.inv_ndb:DashRootInvNewtonDB",
            "_matrix_root_inv_newton_db",
            _iterated,
            _PARAMETERS,
        ),
    ),
)


def enable(*, any_version: bool = False) -> Enabled:
    """Put these kernels into DASH, in this process: see `Integration.enable`."""
    if not any_version:
        check_if_installed("ista_dash", "ista-daslab-optimizers", VERSIONS)
    return INTEGRATION.enable(any_version=any_version)
