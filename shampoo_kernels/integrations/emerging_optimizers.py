"""NVIDIA's Emerging-Optimizers on these kernels.

    from shampoo_kernels.integrations import emerging_optimizers

    emerging_optimizers.enable()  # or for a while: with emerging_optimizers.enable(): ...

What `enable()` changes (options, state and formulas stay the peer's):

- `mat_root_inv_via_scaled_cans`: the Newton iteration, symmetric to the bit, for eigenvalues from
  1e-7 of the largest up, where ten CANS steps end too. A matrix on which it does not converge (one
  host synchronisation asks) gets the peer's steps.
- `update_kronecker_factors` of SOAP, and its KL-Shampoo form (KL-SOAP, REKLS): half of each outer
  product, mirrored; KL without the n x n correction. The precision is that of
  `torch.get_float32_matmul_precision`.

Beside that, for calling by hand: `ShampooPreconditioner`, which follows the peer's
`ShampooPreconditionerProtocol`, and `batched_tsyrk_ex` for any device and size.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from shampoo_kernels.integrations._patching import (
    Enabled,
    Integration,
    Replacement,
    UnsupportedPeer,
)
from shampoo_kernels.ops.gram_ema import gram_ema_
from shampoo_kernels.ops.inverse_root import RootStatus, inverse_root
from shampoo_kernels.ops.precondition import precondition

VERSIONS = ("0.5.0",)  # at commit fd77292
_PACKAGE = "emerging_optimizers.legacy_soap"
# Of the smallest eigenvalue to the bound: (product of the peer's first coefficients)^-2.
_FLOOR = 1e-7
_Function = Callable[..., Any]


def _cans(original: _Function) -> _Function:
    def mat_root_inv_via_scaled_cans(x: Tensor, eps: float = 1e-12) -> Tensor:
        precision = torch.get_float32_matmul_precision()
        square = x.ndim in (2, 3) and x.shape[-1] == x.shape[-2]
        if not square or x.dtype != torch.float32 or precision == "medium" or x.numel() == 0:
            return original(x, eps)  # which says what is wrong
        result = inverse_root(x.detach(), 2, ridge=0, design_floor=_FLOOR, method="newton")
        # Below eps the peer damps.
        norm = torch.linalg.matrix_norm(x, torch.inf)
        solved = (result.status == RootStatus.CONVERGED) & (norm >= eps)
        if solved.all():
            return result.root
        if x.ndim == 2:
            return original(x, eps)
        result.root[~solved] = original(x[~solved], eps)
        return result.root

    return mat_root_inv_via_scaled_cans


def _factors(original: _Function) -> _Function:
    def update_kronecker_factors(
        kronecker_factor_list: list[Tensor], grad: Tensor, shampoo_beta: float
    ) -> None:
        with torch.no_grad():
            for factor, side in zip(kronecker_factor_list, ("left", "right"), strict=False):
                _accumulate(factor, grad, shampoo_beta, side)

    return update_kronecker_factors


def _kl_factors(original: _Function) -> _Function:
    def update_kronecker_factors_kl_shampoo(
        kronecker_factor_list: Iterable[Tensor],
        grad: Tensor,
        shampoo_beta: float,
        eigenbasis_list: Iterable[Tensor],
        eigvals_list: Iterable[Tensor],
        eps: float,
        eigval_exp: float = -1.0,
    ) -> None:
        factors, bases, values = map(tuple, (kronecker_factor_list, eigenbasis_list, eigvals_list))
        if grad.ndim != 2 or not len(factors) == len(bases) == len(values) == 2:
            original(factors, grad, shampoo_beta, bases, values, eps, eigval_exp)
            return
        with torch.no_grad():
            # G C Gᵀ with C = Q diag(s) Qᵀ is the Gram matrix of G Q diag(√s).
            left, right = (
                basis * (value.clamp_min(eps) ** eigval_exp / size).sqrt()
                for basis, value, size in zip(bases, values, grad.shape, strict=True)
            )
            updates = grad @ right, left.mT @ grad
            for factor, update, side in zip(factors, updates, ("left", "right"), strict=True):
                _accumulate(factor, update, shampoo_beta, side)

    return update_kronecker_factors_kl_shampoo


def _accumulate(factor: Tensor, grad: Tensor, beta: float, side: str) -> None:
    """By way of the new part alone: the peer's functions, and its tests, take factors that are not
    symmetric, of which `gram_ema_` would read half. Beside the peer's QR the difference is nil."""
    precision = torch.get_float32_matmul_precision()
    part = torch.empty_like(factor, memory_format=torch.contiguous_format)
    gram_ema_(part, grad, 0.0, 1.0, side=side, precision=precision)
    factor.lerp_(part, 1 - beta)


def batched_tsyrk_ex(
    a: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    skip_upper_triangle: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """alpha a aᵀ + beta c for every block, as the peer's Triton kernel of this name.

    It sums in float32, rounds once, and takes every size, stride and device. `enable()` leaves the
    peer's own in place: on a GPU the two have not been compared.

    Args:
        a: (B, N, K) bfloat16.
        c: (B, N, N) bfloat16, symmetric; only its lower triangles are read. Needed for beta != 0.
        skip_upper_triangle: leave the upper triangles of `out` as they are.
        out: (B, N, N) bfloat16, may be c; a new tensor (above the diagonal unspecified, where that
            is skipped) by default.

    Raises:
        TypeError: a is not bfloat16 or not 3-D; RuntimeError: c or out of another shape or dtype.
    """
    if a.dtype != torch.bfloat16 or a.ndim != 3:
        raise TypeError(
            f"batched_tsyrk_ex: a must be bfloat16 and must be 3D (B, N, K), "
            f"got {a.dtype} {tuple(a.shape)}"
        )
    shape = (a.shape[0], a.shape[1], a.shape[1])
    expected = shape, a.dtype, a.device
    for tensor, what in ((c, "c must be of shape (B, N, N)"), (out, "out must be same shape")):
        found = None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device)
        if found not in (None, expected):
            raise RuntimeError(
                f"batched_tsyrk_ex: {what}/device/dtype, got {found}, expected {expected}"
            )
    if c is None and beta != 0:
        raise RuntimeError(f"batched_tsyrk_ex: beta = {beta} needs a c, got None")
    sums = a.new_empty(shape, dtype=torch.float32) if c is None else c.float()
    gram_ema_(sums, a, beta, alpha, side="left")
    if out is None:
        return sums.to(a.dtype)
    if skip_upper_triangle:
        sums = sums.tril() + out.float().triu(1)
    return out.copy_(sums)


class ShampooPreconditioner:
    """L^(-1/p) X R^(-1/p) for one matrix, after the peer's ShampooPreconditionerProtocol.

    L and R are exponential means of G Gᵀ and Gᵀ G, the roots are computed in every step. One on
    which the kernels do not converge, or whose factor is not finite, stays as it was.

    Args:
        state: what `init_state` made, as the optimizer keeps it.
        p: the root of each factor. ridge, precision: as in `shampoo_kernels.inverse_root`.
    """

    def __init__(
        self, state: dict, p: float = 2, ridge: float = 1e-6, precision: str = "highest"
    ) -> None:
        self.p, self.ridge, self.precision = p, ridge, precision
        self.factors: tuple[Tensor, Tensor] = (state["L"], state["R"])
        self.roots: tuple[Tensor, Tensor] = (state["root_L"], state["root_R"])

    @staticmethod
    def init_state(shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """Zero factors and identities as roots for an (m, n) parameter, float32."""
        if len(shape) != 2:
            raise ValueError(f"ShampooPreconditioner: shape must be (m, n), got {tuple(shape)}")
        sides = tuple(zip(("L", "R"), shape, strict=True))
        factors = {side: torch.zeros(n, n, device=device) for side, n in sides}
        return factors | {f"root_{side}": torch.eye(n, device=device) for side, n in sides}

    def init_step(self, grad: Tensor, shampoo_beta: float) -> None:
        """The first step has nothing to correct with: as every other."""
        self.step(grad, shampoo_beta)

    def update_kronecker_factors(self, grad: Tensor, shampoo_beta: float) -> None:
        """factor <- beta factor + (1 - beta) G Gᵀ, and Gᵀ G."""
        for factor, side in zip(self.factors, ("left", "right"), strict=True):
            beta = shampoo_beta
            gram_ema_(factor, grad, beta, 1 - beta, side=side, precision=self.precision)

    def step(self, grad: Tensor, shampoo_beta: float) -> None:
        """Factors, then roots, in place."""
        self.update_kronecker_factors(grad, shampoo_beta)
        for factor, root in zip(self.factors, self.roots, strict=True):
            inverse_root(
                factor, self.p, ridge=self.ridge, precision=self.precision, previous=root, out=root
            )

    def precondition(self, x: Tensor) -> Tensor:
        """root_L @ x @ root_R, x (m, n)."""
        return precondition(x, *self.roots, precision=self.precision)[0]

    def rebind_state(self, state: dict) -> None:
        """The tensors back into the optimizer's state, where they already are."""
        names = ("L", "R", "root_L", "root_R")
        if missing := [name for name in names if name not in state]:
            raise KeyError(f"ShampooPreconditioner: the state has no {', '.join(missing)}")
        state.update(zip(names, (*self.factors, *self.roots), strict=True))


INTEGRATION = Integration(
    "emerging_optimizers",
    (
        Replacement(
            f"{_PACKAGE}.matrix_root_inverse_utils",
            "mat_root_inv_via_scaled_cans",
            _cans,
            "(x, eps=1e-12)",
        ),
        Replacement(
            f"{_PACKAGE}.soap",
            "update_kronecker_factors",
            _factors,
            "(kronecker_factor_list, grad, shampoo_beta)",
        ),
        Replacement(
            f"{_PACKAGE}.soap",
            "update_kronecker_factors_kl_shampoo",
            _kl_factors,
            "(kronecker_factor_list, grad, shampoo_beta, eigenbasis_list, eigvals_list, eps, "
            "eigval_exp=-1.0)",
        ),
    ),
)


def enable(*, any_version: bool = False) -> Enabled:
    """Put these kernels into Emerging-Optimizers, in this process: see `Integration.enable`."""
    if not any_version:
        try:
            import emerging_optimizers as peer
        except (ImportError, SyntaxError) as error:  # its syntax is that of Python 3.12
            raise UnsupportedPeer(f"emerging_optimizers: cannot be imported ({error})") from error
        found = getattr(peer, "__shortversion__", "none")
        if found not in VERSIONS:
            raise UnsupportedPeer(
                f"emerging_optimizers: tested with {' or '.join(VERSIONS)}, got {found} "
                "(any_version=True tries it)"
            )
    return INTEGRATION.enable(any_version=any_version)
