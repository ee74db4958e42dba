"""Parameters, gradients and steps for the tests of optimizers."""

import torch
from torch import nn


def parameters(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def gradients(shape, steps, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (steps, *shape)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).unbind()


def train(optimizer, pairs):
    """pairs: (parameter, its gradient in each step, None for a missing one)."""
    for step in range(len(pairs[0][1])):
        for parameter, grads in pairs:
            parameter.grad = None if grads[step] is None else grads[step].clone()
        optimizer.step()
