"""Whole optimizer steps against torch's AdamW and pytorch_optimizer's DASH and Shampoo.

A row is one cycle of ten steps, in which every root is computed anew once by all but AdamW: ours
computes a tenth of them in each step, the others all in one. Random gradients, fixed beforehand.
"""

import pytest
import torch
from conftest import QUICK
from shampoo_kernels import Shampoo
from torch import nn

CYCLE = 10
WIDTH, LAYERS = 256, 2 if QUICK else 6
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


@pytest.mark.parametrize("model", ["gpt", "resnet"])
def bench_shampoo(versus, model):
    peers = pytest.importorskip("pytorch_optimizer")
    shapes = {"gpt": GPT, "resnet": RESNET}[model]
    versus(
        cycle(lambda own: Shampoo(own, refresh_every=CYCLE, start_step=1), shapes),
        {
            "AdamW": cycle(torch.optim.AdamW, shapes),
            "DASH": cycle(lambda own: peers.DASH(own, precondition_frequency=CYCLE), shapes),
            "pytorch_optimizer.Shampoo": cycle(
                lambda own: peers.Shampoo(own, preconditioning_compute_steps=CYCLE), shapes
            ),
        },
        case=f"{model}, {CYCLE} steps, {sum(torch.Size(s).numel() for s in shapes):,} parameters",
    )
