"""Whole steps of optimizers on the shapes of models, bfloat16 weights and random gradients, on a
GPU: rows of gpu_bench.py. A model whose weights and states do not fit is left out, with the bytes.
"""

import functools
import importlib.util
import math
from collections.abc import Callable

import cases
import gpu_timing as timing
import torch
from gpu_timing import BFLOAT16, eager, milliseconds
from torch import nn

from shampoo_kernels import Shampoo, state_bytes

CYCLE = 10  # steps between two roots
MODELS = {
    "ResNet-50": cases.resnet50(),
    "ViT-B/16": cases.vit_b(),
    "GPT-2 124M": cases.GPT2,
    "Llama 3.2 1B": cases.LLAMA_1B,
}
THEIRS_TO = 200e6  # parameters: above, DASH's and SOAP's states would not fit beside the others


class Cycle:
    """CYCLE steps of an optimizer of its own."""

    def __init__(self, make: Callable, shapes: list[cases.Shape]) -> None:
        self.parameters = [
            nn.Parameter(
                torch.randn(shape, device=timing.DEVICE, dtype=BFLOAT16) / math.sqrt(shape[-1])
            )
            for shape in shapes
        ]
        for parameter in self.parameters:
            parameter.grad = torch.randn_like(parameter)
        self.optimizer = make(self.parameters)

    def __call__(self) -> None:
        for _ in range(CYCLE):
            self.optimizer.step()


def optimizers(parameters: int) -> dict[str, Callable]:
    ours = functools.partial(Shampoo, refresh_every=CYCLE)
    found: dict[str, Callable] = {"ours": ours, "AdamW": torch.optim.AdamW}
    if parameters <= THEIRS_TO and importlib.util.find_spec("pytorch_optimizer"):
        import pytorch_optimizer

        found["DASH"] = functools.partial(pytorch_optimizer.DASH, precondition_frequency=CYCLE)
        found["SOAP"] = functools.partial(pytorch_optimizer.SOAP, precondition_frequency=CYCLE)
    return found


def bench_steps(name: str, rate: dict[str, float]) -> dict:
    """Milliseconds of one step, from ten; one optimizer after the other has the memory. No error:
    there is no step that all of them should make."""
    shapes = MODELS[name]
    needed, free = bytes_needed(shapes), torch.cuda.mem_get_info()[0]
    if needed > free:
        raise MemoryError(f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    found: dict[str, float | None] = {}
    for which, make in optimizers(cases.count(shapes)).items():
        try:
            run = Cycle(make, shapes)
            ten = milliseconds({which: [eager(run)]}, rounds=4)[which]
            found[which] = None if ten is None else ten / CYCLE
        except torch.OutOfMemoryError:
            found[which] = None
        run = None  # type: ignore[assignment]
        torch.cuda.empty_cache()
    return {"case": f"one step of {CYCLE}, {name}, {cases.described(shapes)}",
            "milliseconds": found, "floor": None, "error": 0.0}  # fmt: skip


def bytes_needed(shapes: list[cases.Shape]) -> int:
    """Weights, gradients, the state of ours, and a tenth of that for what a step takes beside."""
    own = [nn.Parameter(torch.empty(shape, dtype=BFLOAT16, device="meta")) for shape in shapes]
    kept = 2 * BFLOAT16.itemsize * cases.count(shapes) + state_bytes(own).total
    return kept + kept // 10


def jobs() -> list[tuple[Callable[..., dict], tuple]]:
    return [(bench_steps, (name,)) for name in MODELS]
