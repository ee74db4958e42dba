"""Whole optimizer steps on the shapes of models, random gradients that are fixed beforehand.

`bench_cycles`: ten steps, in which every root is computed anew once by all but AdamW: ours computes
a tenth of them in each step, the others all in one. pytorch_optimizer's Shampoo keeps a factor per
dimension of a convolution, which is cheaper than two of the whole matrix and another method; its
second row is on the matrices that ours and DASH see. SOAP needs no roots, only bases.
`bench_steps`: one step on whole models, which the others would take minutes for. Llama 3.2 1B is
here by one of its layers: all of it takes 35 GB with gradients and state, and a minute a step on
two cores; bench_memory has its bytes, bench/gpu_bench_steps.py its steps.
"""

import math

import cases
import counting
import pytest
import torch
from conftest import QUICK
from counting import CYCLE
from rivals import PACKAGES, package

from shampoo_kernels import Shampoo

CYCLES = (
    {"a tiny GPT": cases.gpt(64, 1, 64, 64)}
    if QUICK
    else {"a small GPT": cases.SMALL_GPT, "a small ResNet": cases.SMALL_RESNET}
)
# The SVDs of Shampoo's factors of 3072 and SOAP's bases of that size are left to the small ones.
LARGE_CYCLES = {} if QUICK else {"one of GPT-2's 12 layers": cases.transformer_layer(768)}
MODELS = {} if QUICK else {
    "ResNet-50": cases.resnet50(),
    "ViT-B/16": cases.vit_b(),
    "GPT-2 124M": cases.GPT2,
    "one of Llama 3.2 1B's 16 layers": cases.LLAMA_LAYER,
}  # fmt: skip


def cycle(make, shapes, steps=CYCLE):
    """A function that makes `steps` steps with an optimizer of its own."""
    torch.manual_seed(0)
    parameters = counting.parameters(shapes)
    grads = [parameter.grad for parameter in parameters]
    optimizer = make(parameters)

    def run():
        for _ in range(steps):
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad  # HeavyBall takes it away
            optimizer.step()

    return run


def ours(own):
    return Shampoo(own, refresh_every=CYCLE)


@pytest.mark.parametrize("model", CYCLES)
def bench_cycles(versus, model):
    shapes = CYCLES[model]
    baselines = {"AdamW": cycle(torch.optim.AdamW, shapes)}
    if (module := package("pytorch_optimizer")) is not None:
        matrices = [(s[0], math.prod(s[1:])) if len(s) > 1 else s for s in shapes]

        def shampoo(own):
            return module.Shampoo(own, preconditioning_compute_steps=CYCLE)

        baselines |= {
            f"DASH {PACKAGES['pytorch_optimizer']}": cycle(counting.optimizers()["DASH"], shapes),
            "Shampoo, by dimension": cycle(shampoo, shapes),
            "Shampoo, on matrices": cycle(shampoo, matrices),
            "SOAP": cycle(counting.optimizers()["SOAP"], shapes),
        }
    if (module := package("heavyball")) is not None:
        baselines["HeavyBall SOAP"] = cycle(
            lambda own: module.SOAP(own, precondition_frequency=CYCLE), shapes
        )
    case = f"{model}, {CYCLE} steps, {cases.described(shapes)}"
    versus(cycle(ours, shapes), baselines, case=case)


@pytest.mark.parametrize("model", LARGE_CYCLES)
def bench_large_cycles(versus, model):
    shapes = LARGE_CYCLES[model]
    baselines = {"AdamW": cycle(torch.optim.AdamW, shapes)}
    if package("pytorch_optimizer") is not None:
        baselines[f"DASH {PACKAGES['pytorch_optimizer']}"] = cycle(
            counting.optimizers()["DASH"], shapes
        )
    case = f"{model}, {CYCLE} steps, {cases.described(shapes)}"
    versus(cycle(ours, shapes), baselines, case=case, fewest=1)


@pytest.mark.parametrize("model", MODELS)
def bench_steps(versus, model):
    shapes = MODELS[model]
    versus(
        cycle(ours, shapes, steps=1),
        {"AdamW": cycle(torch.optim.AdamW, shapes, steps=1)},
        case=f"{model}, one step, {cases.described(shapes)}",
    )
