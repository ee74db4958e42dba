"""gram_ema_ against `baddbmm_`, the one call that a user has for it, on the blocks of real models.

With a weight W the call has to be two. HeavyBall's `update_ggt` is an einsum and a lerp.
"""

from functools import partial

import pytest
import torch
from cases import STACKS, relative
from conftest import QUICK
from judging import errors_of
from rivals import package

from shampoo_kernels import gram_ema_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"tiny": (64, 32, 48)} if QUICK else STACKS
WEIGHTED = (
    {"tiny": (16, 32, 48)} if QUICK else {"64 x 128²": (64, 128, 128), "4 x 768²": (4, 768, 768)}
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", SHAPES)
def bench_gram_ema(versus, name, side, dtype):
    if dtype == torch.float16 and side == "right":
        pytest.skip("float16 is measured on the left alone")
    batch, m, n = SHAPES[name]
    grad = torch.randn(batch, m, n).to(dtype)
    kept, summed = (m, n) if side == "left" else (n, m)
    stat = torch.zeros(batch, kept, kept)
    functions = {
        "ours": partial(gram_ema_, stat.clone(), grad, 0.95, 0.05, side=side),
        "baddbmm_": partial(_baddbmm, stat.clone(), grad, side),
    }
    # In float16 HeavyBall's product is torch's on a CPU, ten times as slow as in float32.
    large = batch * m * n > 2**20
    theirs = None if dtype == torch.float16 and large else package("heavyball")
    if theirs is not None:
        functions["HeavyBall"] = partial(_heavyball, theirs, stat.clone(), grad, side)
    exact = _baddbmm(stat.double(), grad.double(), side)
    errors = errors_of(functions, lambda result: relative(result, exact))
    versus(
        functions.pop("ours"),
        functions,
        case=f"{name}: {side} {batch} x {m} x {n} {str(dtype).removeprefix('torch.')}",
        flops=batch * kept * (kept + 1) * summed,
        moved=grad.nbytes + 2 * stat.nbytes,
        rate="bfloat16" if dtype == torch.bfloat16 else "float32",
        errors=errors,
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", WEIGHTED)
def bench_weighted(versus, name, side):
    batch, m, n = WEIGHTED[name]
    grad = torch.randn(batch, m, n)
    kept, summed = (m, n) if side == "left" else (n, m)
    W = torch.randn(batch, summed, summed)
    W = (W + W.mT) / 2
    stat = torch.zeros(batch, kept, kept)

    def two_products(s, grad, W):
        G = grad if side == "left" else grad.mT
        return s.baddbmm_(torch.bmm(G, W), G.mT, beta=0.95, alpha=0.05)

    exact = two_products(stat.double(), grad.double(), W.double())
    functions = {
        "ours": partial(gram_ema_, stat.clone(), grad, 0.95, 0.05, side=side, weight=W),
        "bmm, baddbmm_": partial(two_products, stat.clone(), grad, W),
    }
    errors = errors_of(functions, lambda result: relative(result, exact))
    versus(
        functions.pop("ours"),
        functions,
        case=f"{side} {batch} x {m} x {n} float32",
        flops=batch * (2 * kept * summed**2 + kept * (kept + 1) * summed),
        errors=errors,
    )


def _baddbmm(stat, grad, side):
    G = (grad if side == "left" else grad.mT).to(stat.dtype)
    return stat.baddbmm_(G, G.mT, beta=0.95, alpha=0.05)


def _heavyball(package, stat, grad, side):
    stats = [stat, None] if side == "left" else [None, stat]
    package.utils.update_ggt(grad, stats, 10000, False, 0.95)
    return stat
