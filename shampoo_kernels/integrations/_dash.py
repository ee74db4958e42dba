"""What `pytorch_optimizer.DASH` runs on these kernels; the formulas and options are the peer's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shampoo_kernels.integrations._stacks import (
    add_to_diagonal,
    better_by_all_cores,
    eigh_root,
    newton_root,
    solved_by_eigh,
)
from shampoo_kernels.ops.gram_ema import gram_ema_
from shampoo_kernels.ops.precondition import precondition

_NEWTON_LIMIT = 256  # on a CPU eigh is faster above, as method="auto" knows
_Function = Callable[..., Any]


def inverse_root(original: _Function) -> _Function:
    def compute_inverse_root(self: Any, matrix: Tensor, root: int, group: dict) -> Tensor:
        twice = group["inverse_root_method"] == "eigh"  # so does the peer
        if twice and better_by_all_cores(matrix):
            return original(self, matrix, root, group)
        damped = add_to_diagonal(matrix, group["matrix_eps"] * (2 if twice else 1))
        if twice:
            solved = solved_by_eigh(damped, root)
            return original(self, matrix, root, group) if solved is None else solved
        if matrix.device.type == "cpu" and matrix.shape[-1] > _NEWTON_LIMIT:
            return eigh_root(damped, root)
        return newton_root(damped, root)

    return compute_inverse_root


def update(original: _Function) -> _Function:
    def update_block(self: Any, grad: Tensor, state: dict, one_sided: bool, group: dict) -> Tensor:
        G = grad.to(state["exp_avg_sq"].dtype)  # (B, m, n)
        B = len(G)
        beta = group["betas"][1]
        statistics, roots = state["statistics"], state["inverse_roots"]
        # Of square blocks left and right are the halves of one stack.
        gram_ema_(statistics[0][:B], G, beta, 1 - beta, side="left")
        if not one_sided:
            gram_ema_(statistics[-1][-B:], G, beta, 1 - beta, side="right")
        first, adam = _adam(self, G, state, group)
        if group["step"] < group["start_preconditioning_step"]:
            return _momentum(adam, state, group)
        if not roots or group["step"] % group["precondition_frequency"] == 0:
            p = 2 if one_sided else 4
            roots[:] = [self.compute_inverse_root(statistic, p, group) for statistic in statistics]
        direction, squared = precondition(
            first, roots[0][:B], None if one_sided else roots[-1][-B:]
        )
        length = torch.linalg.vector_norm(adam, dim=(1, 2)) / squared.sqrt_().add_(1e-16)
        return _momentum(direction.mul_(length.view(-1, 1, 1)), state, group)

    return update_block


def _adam(optimizer: Any, G: Tensor, state: dict, group: dict) -> tuple[Tensor, Tensor]:
    """(the first moment, Adam's update); both moments are brought up to date."""
    beta1, beta2 = group["betas"]
    beta2 = beta2 if group["grafting_beta"] is None else group["grafting_beta"]
    second = state["exp_avg_sq"].mul_(beta2).addcmul_(G, G, value=1 - beta2)
    first = state["exp_avg"].lerp_(G, 1 - beta1) if beta1 > 0 else G
    scales = [1.0, 1.0]
    if group["correct_bias"]:
        scales = [optimizer.debias(b, group["step"]) for b in (beta1, beta2)]
    size = (second / scales[1]).sqrt_().add_(group["eps"])
    return first, (first / scales[0]).div_(size.clamp_min_(torch.finfo(G.dtype).tiny))


def _momentum(update: Tensor, state: dict, group: dict) -> Tensor:
    mu = group["momentum"]
    if mu == 0:
        return update
    kept = state["momentum"].mul_(mu).add_(update)
    return update.add_(kept, alpha=mu) if group["nesterov"] else kept
