"""Writes version_<n>.pt with the package that is imported: run it before the version is raised.

    python tests/states/make.py

Six steps on a few parameters in float64, the state after the third, the weights after the sixth.
"""

from pathlib import Path

import torch
from torch import nn

SHAPES = [(8, 4), (5,), (3, 2, 2), (8, 8), ()]
OPTIONS = {"block_size": 4, "start_step": 2, "refresh_every": 1, "lr": 0.01, "ridge": 1e-3}


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in SHAPES]


def steps(optimizer, own, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in own:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()


def made(make_optimizer):
    own = parameters()
    optimizer = make_optimizer(own, **OPTIONS)
    steps(optimizer, own, 0, 3)
    weights = [p.detach().clone() for p in own]
    state = optimizer.state_dict()
    steps(optimizer, own, 3, 6)
    return {"weights": weights, "optimizer": state, "after": [p.detach() for p in own]}


if __name__ == "__main__":
    from shampoo_kernels import Shampoo

    content = made(Shampoo)
    version = content["optimizer"]["param_groups"][0]["version"]
    torch.save(content, Path(__file__).with_name(f"version_{version}.pt"))
