"""Whole optimizer steps against torch's AdamW and pytorch_optimizer's DASH and Shampoo.

A row is one cycle of ten steps, in which every root is computed anew once by all but AdamW: ours
computes a tenth of them in each step, the others all in one. Random gradients, fixed beforehand.
pytorch_optimizer's Shampoo keeps a factor per dimension of a convolution, which is cheaper than two
of the whole matrix and another method; its second row is on the matrices that ours and DASH see.
"""

import math

import pytest
import torch
from conftest import QUICK
from torch import nn

from shampoo_kernels import Shampoo

CYCLE = 10
WIDTH, LAYERS = (96, 1) if QUICK else (256, 2)
GPT = [(256, WIDTH), (128, WIDTH), (WIDTH,)] + LAYERS * [
    (3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (WIDTH,), (WIDTH,),
]  # fmt: skip
RESNET = [
    (16, 3, 3, 3), *6 * [(16, 16, 3, 3)],
    (32, 16, 3, 3), *5 * [(32, 32, 3, 3)],
    (64, 32, 3, 3), *5 * [(64, 64, 3, 3)],
    (10, 64), (10,), *7 * [(16,), (16,)], *6 * [(32,), (32,)], *6 * [(64,), (64,)],
]  # fmt: skip


def cycle(make, shapes, dtype=torch.float32):
    """A function that makes ten steps with an optimizer of its own."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = make(parameters)

    def run():
        for _ in range(CYCLE):
            optimizer.step()

    return run


@pytest.mark.parametrize("model", ["gpt"] if QUICK else ["gpt", "resnet"])
def bench_shampoo(versus, model):
    peers = pytest.importorskip("pytorch_optimizer")
    shapes = {"gpt": GPT, "resnet": RESNET}[model]
    matrices = [(s[0], math.prod(s[1:])) if len(s) > 1 else s for s in shapes]

    def peer_shampoo(own):
        return peers.Shampoo(own, preconditioning_compute_steps=CYCLE)

    versus(
        cycle(lambda own: Shampoo(own, refresh_every=CYCLE), shapes),
        {
            "AdamW": cycle(torch.optim.AdamW, shapes),
            "DASH": cycle(lambda own: peers.DASH(own, precondition_frequency=CYCLE), shapes),
            "Shampoo, by dimension": cycle(peer_shampoo, shapes),
            "Shampoo, on matrices": cycle(peer_shampoo, matrices),
        },
        case=f"{model}, {CYCLE} steps, {sum(map(math.prod, shapes)):,} parameters",
    )
