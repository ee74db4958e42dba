"""orthogonalize: the polar factor against torch.linalg.svd, Muon's five steps against packages.

Muon's steps stop far from the polar factor on purpose, so their error is against the same
polynomial in float64. The packages multiply in bfloat16 unless they are told not to.
"""

import pytest
import torch
from cases import relative
from conftest import QUICK
from judging import errors_of
from rivals import PACKAGES, package

from shampoo_kernels import orthogonalize

SHAPES = [(2, 32, 48)] if QUICK else [(16, 128, 256), (2, 512, 512)]
MUON = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_polar_factor(versus, shape):
    G = torch.randn(shape)
    exact = _by_svd(G.double())
    functions = {"ours": lambda: orthogonalize(G), "torch.linalg.svd": lambda: _by_svd(G)}
    errors = errors_of(functions, lambda found: relative(found, exact))
    versus(
        functions.pop("ours"),
        functions,
        case=f"polar factor, {' x '.join(map(str, shape))}",
        errors=errors,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_muon_steps(versus, shape):
    G = torch.randn(shape)
    exact = _muon(G.double())
    functions = {
        "ours": lambda: orthogonalize(G, coefficients=MUON),
        "ours, medium": lambda: orthogonalize(G, coefficients=MUON, precision="medium"),
        "plain torch": lambda: _muon(G),
        "plain torch, bfloat16": lambda: _muon(G.bfloat16()),
    }
    if (module := package("pytorch_optimizer")) is not None:
        name = f"pytorch_optimizer {PACKAGES['pytorch_optimizer']}"
        for dtype in (torch.float32, torch.bfloat16):
            functions[f"{name}, {str(dtype).removeprefix('torch.')}"] = lambda dtype=dtype: (
                module.optimizer.utils.matrix.zero_power_via_newton_schulz_5(G, dtype=dtype)
            )
    errors = errors_of(functions, lambda found: relative(found, exact))
    batch, m, n = shape
    short, long = min(m, n), max(m, n)
    versus(
        functions.pop("ours"),
        functions,
        case=f"Muon's five steps, {' x '.join(map(str, shape))}",
        flops=5 * batch * (short * (short + 1) * (long + short) + 2 * short**2 * long),
        errors=errors,
    )


def _muon(G, steps=5):
    a, b, c = MUON
    X = G / G.norm(dim=(-2, -1), keepdim=True)
    X = X if X.shape[-2] <= X.shape[-1] else X.mT
    for _ in range(steps):
        S = X @ X.mT
        X = a * X + (b * S + c * (S @ S)) @ X
    return X if G.shape[-2] <= G.shape[-1] else X.mT


def _by_svd(G):
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh
