"""One run of the study: a setting trained from one seed, measured along the way, kept in a file.

What is stored is plain numbers; tables, plots and claims are made from the files alone.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shampoo_kernels.commands._data import Data
from shampoo_kernels.commands._training import batches
from shampoo_kernels.commands.study import models
from shampoo_kernels.commands.study.settings import Setting
from shampoo_kernels.ops.kronecker_power_step import kronecker_power_step
from shampoo_kernels.study import (
    GradientHistory,
    Gradients,
    Unmeasurable,
    cosine,
    measure,
    power_steps,
    sample,
)

ALONG = ("optimal", "shampoo_squared", "shampoo", "kfac")
VIEWS = {"gauss_newton": "Gauss–Newton", "adagrad": "Adagrad"}
EXACT = 1 << 13  # weights; larger layers are measured in float32, to about five digits
Progress = Callable[[str], None]


def run(setting: Setting, data: Data, seed: int, progress: Progress) -> dict[str, Any]:
    """Train from the seed with AdamW and measure; `progress` is called after every point."""
    model = models.build(setting.model, data.train_images, len(setting.classes), seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr)
    histories = {layer: GradientHistory(layer=layer) for layer in setting.layers}
    order = torch.randperm(len(data.train_images), generator=_generator(seed))[: setting.examples]
    examples, labels = data.train_images[order], data.train_labels[order]
    size = min(setting.batch_size, len(data.train_images))
    stream = batches(len(data.train_images), size, seed)
    weights = {layer: model.get_parameter(f"{layer}.weight") for layer in setting.layers}
    rows: list[dict[str, Any]] = []
    tricks: list[dict[str, Any]] = []
    curve = []
    for step in range(setting.steps + 1):
        if step in setting.points:
            last = step == setting.steps
            curve.append({"step": step} | _validation(model, data))
            truths = _sample(model, examples, layers=setting.layers, labels="expected")
            for layer, truth in truths.items():
                rows += _rows(step, layer, "gauss_newton", truth, last)
                if step:
                    past = histories[layer].gradients(_dtype(*truth.shape))
                    rows += _rows(step, layer, "adagrad", past, last)
            if step in setting.trick_points:
                tricks += _tricks(setting, model, truths, examples, labels, step, seed)
            progress(f"{setting.name}, seed {seed}, step {step}")
        if step < setting.steps:
            index = next(stream)
            optimizer.zero_grad()
            F.cross_entropy(model(data.train_images[index]), data.train_labels[index]).backward()
            for layer, weight in weights.items():
                assert weight.grad is not None
                histories[layer].append(weight.grad)
            optimizer.step()
    return {
        "setting": setting.name,
        "seed": seed,
        "fingerprint": setting.fingerprint(),
        "data": data.title,
        "training_images": len(data.train_images),
        "curve": curve,
        "rows": rows,
        "tricks": tricks,
        "one_step": _one_step(model, setting.layers, examples[:32], labels[:32]),
    }


def _sample(*args: Any, **options: Any) -> dict[str, Gradients]:
    found = sample(*args, **options)
    for grads in found.values():
        grads.dtype = _dtype(*grads.shape)
    return found


def _dtype(m: int, n: int) -> torch.dtype:
    return torch.float64 if m * n <= EXACT else torch.float32


def _rows(step: int, layer: str, view: str, truth: Gradients, last: bool) -> list[dict[str, Any]]:
    """One row, or none where the gradients vanish; at the end, with all there is that is finite."""
    names = None
    if not last:
        names = [name for name in ALONG if name != "kfac" or truth.kfac is not None]
    try:
        found = measure(truth, names=names, spectrum=last)
    except Unmeasurable:
        return []
    finite = {
        key: value
        for key, value in found.row().items()
        if not isinstance(value, float) or math.isfinite(value)
    }
    return [{"step": step, "view": view} | finite]


def _tricks(
    setting: Setting,
    model: nn.Module,
    truths: dict[str, Gradients],
    examples: Tensor,
    labels: Tensor,
    step: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Shampoo² made of batch gradients, real or sampled labels, against the exact Gauss-Newton.

    Batches are drawn with replacement from the examples that the truth is made of. "expectation" is
    what infinitely many batches would give: B E[G_B G_Bᵀ] = E[GGᵀ] + (B-1) E[G] E[G]ᵀ.
    """
    generator = _generator(seed, step)
    singles = _sample(model, examples, labels, layers=setting.layers)
    found = []
    for batch_size in setting.batch_sizes:
        count = setting.batches * batch_size
        index = torch.randint(0, len(examples), (count,), generator=generator)
        for kind in ("real", "sampled"):
            made = _sample(
                model, examples[index], labels[index] if kind == "real" else None,
                layers=setting.layers, labels=kind, batch_size=batch_size, generator=generator,
            )  # fmt: skip
            for layer, truth in truths.items():
                base = singles[layer] if kind == "real" else truth
                row = {"step": step, "layer": layer, "labels": kind, "batch_size": batch_size}
                try:
                    row["shampoo_squared"] = cosine(truth, *power_steps(made[layer], 1))
                    row["expectation"] = cosine(truth, *_expected(base, batch_size, kind))
                except Unmeasurable:
                    continue
                found.append(row)
    return found


def _expected(grads: Gradients, batch_size: int, kind: str) -> tuple[Tensor, Tensor]:
    """L and R of infinitely many batches; labels that the model expects have E[G] = 0."""
    left, right = grads.statistics
    if kind == "sampled":
        return left, right
    mean = grads.mean()
    return left + (batch_size - 1) * mean @ mean.mT, right + (batch_size - 1) * mean.mT @ mean


def _one_step(
    model: nn.Module, layers: Sequence[str], examples: Tensor, labels: Tensor
) -> dict[str, float]:
    """How far kronecker_power_step from the identities is from E[GGᵀ] and E[GᵀG], relative, at
    best scale: the paper's proposition, on gradients of this network."""
    found = {}
    for layer, grads in sample(model, examples, labels, layers=layers).items():
        G = grads.values().double()
        ours = kronecker_power_step(G, *grads.identities())
        shampoo = (G @ G.mT).mean(0), (G.mT @ G).mean(0)
        found[layer] = max(
            float((a / a.norm() - b / b.norm()).norm()) for a, b in zip(ours, shampoo, strict=True)
        )
    return found


@torch.no_grad()
def _validation(model: nn.Module, data: Data) -> dict[str, float]:
    scores = torch.cat([model(part) for part in data.validation_images.split(500)])
    loss = float(F.cross_entropy(scores, data.validation_labels))
    accuracy = float((scores.argmax(1) == data.validation_labels).float().mean())
    return {"loss": loss, "accuracy": accuracy}


def _generator(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(10_007**i * s for i, s in enumerate(seeds, 1)))


def path_of(folder: Path, setting: Setting, seed: int) -> Path:
    return folder / "runs" / f"{setting.name}-seed{seed}.json"


def read(path: Path, setting: Setting) -> dict[str, Any] | None:
    """The stored run, or None where there is none, or one of other settings, or a damaged one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and found.get("fingerprint") == setting.fingerprint()
    return found if same else None


def as_json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1, allow_nan=False)


def write(path: Path, content: str | bytes) -> None:
    """All of it or nothing: a run that is stopped meanwhile leaves the old file, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
