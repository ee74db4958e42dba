"""Bytes: of the optimizers' states, and at the peak of a call. Nothing here is timed."""

import counting
import pytest
import torch
from cases import GPT2, LLAMA_1B, LLAMA_LAYER, Shape, count, resnet50, transformer_layer, vit_b
from conftest import QUICK

MODELS = (
    {"a layer of width 64": transformer_layer(64)}
    if QUICK
    else {
        "a layer of GPT-2 or ViT-B": transformer_layer(768),
        "a layer of Llama 3.2 1B": LLAMA_LAYER,
    }
)


WHOLE: dict[str, list[Shape]] = (
    {"a layer of width 64": transformer_layer(64)}
    if QUICK
    else {
        "ResNet-50": resnet50(),
        "ViT-B/16": vit_b(),
        "GPT-2 124M": GPT2,
        "Llama 3.2 1B": LLAMA_1B,
    }
)
VARIANTS: dict[str, dict] = {
    "ours": {},
    "roots in bfloat16": {"root_dtype": torch.bfloat16},
    "one side": {"p": (2, None)},
    'application="soap"': {"application": "soap", "graft": None},
}


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


@pytest.mark.parametrize("model", WHOLE)
def bench_variants(note, model):
    """Of whole models, from their shapes alone."""
    shapes = WHOLE[model]
    cells: dict[str, object] = {
        name: counting.planned_bytes_a_parameter(shapes, **options)
        for name, options in VARIANTS.items()
    }
    for name in ("AdamW", "DASH", "SOAP"):
        if (make := counting.optimizers().get(name)) is not None:
            try:
                cells[name] = counting.bytes_a_parameter(make, shapes, fake=True)
            except Exception as error:
                cells[name] = f"failed: {type(error).__name__}"
    note("bytes of state a parameter, variants", model=f"{model}, {count(shapes):,}", **cells)


def bench_peaks(note):
    for what, by, mebibytes in counting.peaks():
        note("MiB beyond inputs and state at the peak", what=what, by=by, MiB=mebibytes)
