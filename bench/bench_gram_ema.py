"""gram_ema_ against `baddbmm_`, the one call that a user has for it."""

import pytest
import torch
from conftest import QUICK

from shampoo_kernels import gram_ema_

# (blocks, m, n): batches of small blocks, single large ones, wide and tall.
SQUARE = [
    (1024, 16, 16),
    (512, 32, 32),
    (256, 64, 64),
    (64, 128, 128),
    (16, 256, 256),
    (4, 512, 512),
    (1, 1024, 1024),
]
SQUARE += [] if QUICK else [(4, 1024, 1024), (1, 2048, 2048)]
OTHER = [(1024, 16, 144), (16, 256, 1024), (16, 1024, 256)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SQUARE + OTHER, ids=str)
def bench_gram_ema(versus, shape, side, dtype):
    batch, m, n = shape
    grad = torch.randn(batch, m, n).to(dtype)
    kept, summed = (m, n) if side == "left" else (n, m)
    stat = torch.zeros(batch, kept, kept)
    theirs, ours = stat.clone(), stat.clone()
    exact = _baddbmm(stat.double(), grad.double(), side)
    single = grad.float()

    def relative(result):
        return (result.double() - exact).norm() / exact.norm()

    errors = {
        "ours": relative(gram_ema_(ours.clone(), grad, 0.95, 0.05, side=side)),
        "baddbmm_": relative(_baddbmm(theirs.clone(), single, side)),
    }
    versus(
        lambda: gram_ema_(ours, grad, 0.95, 0.05, side=side),
        {"baddbmm_": lambda: _baddbmm(theirs, grad.float(), side)},
        case=f"{side} {batch} x {m} x {n} {str(dtype).removeprefix('torch.')}",
        flops=batch * kept * (kept + 1) * summed,
        errors=errors,
    )


def _baddbmm(stat, grad, side):
    G = grad if side == "left" else grad.mT
    return stat.baddbmm_(G, G.mT, beta=0.95, alpha=0.05)
