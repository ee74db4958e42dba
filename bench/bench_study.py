"""The cosines of one layer against forming H, which small layers allow.

Factors of a linear layer make every half step of the power iteration nearly free. Gradients that
are only known as matrices take N m n (m + n) multiplications in each of about ten half steps,
where H takes N (m n)²: there the gain grows with the layer, until H no longer fits the memory.

The baseline does no more than it has to: H once, its entries put in the order that makes a
Kronecker product a matrix of rank one, and power iteration on that matrix.
"""

import pytest
import torch
from conftest import QUICK

from shampoo_kernels.study import DenseGradients, FactoredGradients, cosines


def forming_h(grads, tol=1e-6):
    count, m, n = grads.shape
    g = grads.flatten(1)
    H = (g.mT @ g / count).view(m, n, m, n).permute(0, 2, 1, 3).reshape(m * m, n * n)
    right = torch.eye(n, dtype=H.dtype).flatten() / n**0.5
    moved = 1.0
    while moved > tol:
        left = H @ right
        new = H.mT @ (left / left.norm())
        sigma = new.norm()
        moved, right = (new / sigma - right).norm(), new / sigma
    L, R = (grads @ grads.mT).mean(0), (grads.mT @ grads).mean(0)
    roots = [(v * e.clamp(min=0).sqrt()) @ v.mT for e, v in map(torch.linalg.eigh, (L, R))]
    norm = H.norm()
    found = [
        a.flatten() @ H @ b.flatten() / (a.norm() * b.norm() * norm) for a, b in ((L, R), roots)
    ]
    return [float(sigma / norm), *map(float, found)]


@pytest.mark.parametrize(("m", "n"), [(24, 48)] if QUICK else [(48, 96), (96, 160)])
@pytest.mark.parametrize("kind", ["linear layer", "any layer"])
def bench_cosines(versus, kind, m, n):
    samples = 512
    delta = torch.logspace(0, -1, m, dtype=torch.float64) * torch.randn(samples, 1, 1, m).double()
    act = torch.randn(samples, 1, n, dtype=torch.float64).relu()
    grads = FactoredGradients(delta, act)
    values = grads.values()

    def ours():  # made anew: what is cached would not be timed
        if kind == "linear layer":
            return cosines(FactoredGradients(delta, act))
        return cosines(DenseGradients(values))

    exact = forming_h(values, tol=1e-10)
    versus(
        ours,
        {"forming H": lambda: forming_h(values)},
        case=f"cosines, {samples} gradients of {m} x {n}, {kind}",
        errors={"ours": max(abs(a - b) for a, b in zip(ours(), exact, strict=True))},
    )
