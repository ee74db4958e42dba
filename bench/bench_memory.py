"""Bytes: of the optimizers' states, and at the peak of a call. Nothing here is timed."""

import counting
import pytest
from cases import LLAMA_LAYER, count, resnet50, transformer_layer
from conftest import QUICK

MODELS = (
    {"a layer of width 64": transformer_layer(64)}
    if QUICK
    else {
        "ResNet-50": resnet50(),
        "a layer of GPT-2 or ViT-B": transformer_layer(768),
        "a layer of Llama 3.2 1B": LLAMA_LAYER,
    }
)


@pytest.mark.parametrize("model", MODELS)
def bench_state(note, model):
    shapes = MODELS[model]
    cells = {}
    for name, make in counting.optimizers().items():
        try:  # ours looks at its numbers, so it runs on real ones
            cells[name] = counting.bytes_a_parameter(make, shapes, fake=name != "ours")
        except Exception as error:
            cells[name] = f"failed: {type(error).__name__}"
    note("bytes of state a parameter", model=f"{model}, {count(shapes):,} parameters", **cells)


def bench_peaks(note):
    for what, by, mebibytes in counting.peaks():
        note("MiB beyond inputs and state at the peak", what=what, by=by, MiB=mebibytes)
