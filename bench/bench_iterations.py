"""power_iteration and orthogonal_iteration against the eigensolver that they stand in for."""

import torch

from shampoo_kernels import orthogonal_iteration, power_iteration


def _stack(batch=32, n=256):
    G = torch.randn(batch, n, n)
    return G @ G.mT / n


def bench_power_iteration(versus):
    A = _stack()
    largest = torch.linalg.eigvalsh(A.double())[:, -1]
    versus(
        lambda: power_iteration(A),
        {"eigvalsh": lambda: torch.linalg.eigvalsh(A)},
        case="power_iteration, 32 x 256² (error: how far below the largest eigenvalue)",
        errors={
            "ours": (1 - power_iteration(A) / largest).max(),
            "eigvalsh": (torch.linalg.eigvalsh(A)[:, -1] / largest - 1).abs().max(),
        },
    )


def bench_orthogonal_iteration(versus):
    A = _stack()
    Q = torch.linalg.eigh(A).eigenvectors

    def plain():
        new = torch.linalg.qr(A @ Q).Q
        return (new * (A @ new)).sum(-2), new

    versus(
        lambda: orthogonal_iteration(A, Q),
        {
            "plain torch": plain,
            "eigh": lambda: torch.linalg.eigh(A),
        },
        case="orthogonal_iteration, one step, 32 x 256²",
    )
