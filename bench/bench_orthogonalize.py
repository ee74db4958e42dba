"""orthogonalize against the polar factor by torch.linalg.svd."""

import pytest
import torch

from shampoo_kernels import orthogonalize


@pytest.mark.parametrize("shape", [(16, 128, 256), (2, 512, 512)], ids=str)
def bench_orthogonalize(versus, shape):
    G = torch.randn(shape)
    exact = _by_svd(G.double())
    versus(
        lambda: orthogonalize(G),
        {"torch.linalg.svd": lambda: _by_svd(G)},
        case=" x ".join(map(str, shape)),
        errors={
            "ours": (orthogonalize(G) - exact).norm() / exact.norm(),
            "torch.linalg.svd": (_by_svd(G) - exact).norm() / exact.norm(),
        },
    )


def _by_svd(G):
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh
