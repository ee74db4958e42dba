"""What the study avoids: the dense H of a few gradients, gradients one by one, small networks."""

import itertools

import torch
from torch import nn


def gradients(count, m, n, seed=0):
    """Correlated entries and uneven rows, so that the three approximations differ."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(count, m, n, generator=generator, dtype=torch.float64)
    mix = torch.randn(m * n, m * n, generator=generator, dtype=torch.float64)
    return draw + 0.3 * (draw.reshape(count, -1) @ mix).reshape(count, m, n)


def second_moment(grads):
    """H (mn, mn) of g = vec(G), column by column."""
    g = grads.mT.reshape(grads.shape[0], -1)
    return g.mT @ g / grads.shape[0]


def rearranged(H, m, n):
    """Ĥ[m*i' + i, n*j' + j] = H[m*j + i, m*j' + i'], written out index by index."""
    out = torch.empty(m * m, n * n, dtype=H.dtype)
    for i in range(m):
        for i2 in range(m):
            for j in range(n):
                for j2 in range(n):
                    out[m * i2 + i, n * j2 + j] = H[m * j + i, m * j2 + i2]
    return out


def dense_cosine(H, left, right):
    product = torch.kron(right, left)
    return float((H * product).sum() / (H.norm() * product.norm()))


def square_root(A):
    values, vectors = torch.linalg.eigh(A)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def spd(n, seed):
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return A @ A.mT + 0.1 * torch.eye(n, dtype=torch.float64)


def exactly_kronecker(m, n):
    """The mn gradients whose second moment is B⊗A: the columns of its square root. (G, A, B)."""
    A, B = spd(m, 1), spd(n, 2)
    columns = torch.linalg.cholesky(torch.kron(B, A)) * (m * n) ** 0.5
    return columns.mT.reshape(m * n, n, m).mT, A, B


def mlp(*sizes, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def one_by_one(model, layer, losses):
    """The gradient of every loss by one weight, as matrices."""
    weight = dict(model.named_parameters()).get(layer)
    weight = model.get_submodule(layer).weight if weight is None else weight
    return torch.stack(
        [torch.autograd.grad(loss, weight, retain_graph=True)[0].flatten(1) for loss in losses]
    )
