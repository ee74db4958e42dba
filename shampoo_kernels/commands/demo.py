"""Train a small network on real images with AdamW and with Shampoo, and look at the layers."""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from shampoo_kernels import backends
from shampoo_kernels.commands import _data, _report, _results
from shampoo_kernels.commands._plots import draw
from shampoo_kernels.commands._training import (
    BETAS,
    OPTIMIZERS,
    TUNING_SEEDS,
    WEIGHT_DECAY,
    Curve,
    Run,
    compare,
    layer_cosines,
    layer_shapes,
    network,
    tune,
)


@dataclass(frozen=True)
class Extent:
    """How much is run."""

    steps: int
    seeds: int
    batch_size: int
    probes: int  # how often the cosines are measured along a run, besides its start
    learning_rates: tuple[float, ...]


DEFAULT = Extent(200, 3, 64, 4, (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2))
QUICK = Extent(40, 2, 64, 2, DEFAULT.learning_rates[::2])
EXAMPLES = 128
EVALUATIONS = 40  # of the validation loss along a run
MOST_THREADS = 1024
IMAGE_SUFFIXES = (".png", ".pdf", ".svg")

DESCRIPTION = f"""
Trains a small convolutional network with AdamW and with shampoo_kernels.Shampoo: same initial
weights, batches, schedule (warm-up, then cosine), betas and weight decay. The learning rate is
tuned for each on the same grid ({", ".join(f"{lr:g}" for lr in DEFAULT.learning_rates)}) with two
seeds that the comparison does not use again. Then, along Shampoo's training, it measures for every
layer the cosine between E[ggᵀ] and the optimal Kronecker product, Shampoo² (L ⊗ R) and Shampoo
(L^1/2 ⊗ R^1/2), where L = E[GGᵀ] and R = E[GᵀG]. E is the mean over a fixed set of training
examples, g the gradient of one example's loss with its true label: the empirical Fisher, which is
the Hessian view of Morwani et al. (arXiv 2406.17748) with real labels, one example a batch.
"""


class OptionError(Exception):
    """An option with a value that cannot work; the message is one line for the user."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add = parser.add_argument
    add(
        "--data",
        choices=_data.DATASETS,
        default="digits",
        help="digits: 8 x 8 images that come with scikit-learn (default). The others are read from "
        f"the folder in the environment variable {_data.FOLDER} and take several times as long. "
        f"{_data.HELP}",
    )
    add("--steps", type=int, help=f"of every run (default {DEFAULT.steps}; quick {QUICK.steps})")
    add(
        "--seeds",
        type=int,
        help="how many runs of each optimizer are compared, besides the tuning "
        f"(default {DEFAULT.seeds}; quick {QUICK.seeds})",
    )
    add("--batch-size", type=int, help=f"images a step (default {DEFAULT.batch_size})")
    add(
        "--threads",
        type=int,
        default=1,
        help="of torch (default %(default)s: the network is so small that more rarely pay, and on "
        "a busy machine they wait for each other)",
    )
    add(
        "--output",
        type=Path,
        default=Path("shampoo_kernels_demo.png"),
        help="where the picture goes: .png, .pdf or .svg (default %(default)s)",
    )
    add("--json", type=Path, help="also write every number to this .json file")
    add("--quick", action="store_true", help="a short run to see that it works, about 15 seconds")


def run(args: argparse.Namespace) -> int:
    """The whole demo; 0, or 1 and one line on stderr where an option or the data is no good."""
    try:
        extent = _extent(args)
        _check_backend()
        _check_writable("--output", args.output, IMAGE_SUFFIXES)
        if args.json is not None:
            _check_writable("--json", args.json, (".json",))
        data = _data.load(args.data)
        if extent.batch_size > len(data.train_images):
            raise OptionError(
                f"--batch-size must be at most {len(data.train_images)}, the training images, "
                f"got {extent.batch_size}"
            )
    except (OptionError, _data.DataError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        result = measure(data, extent)
    finally:
        torch.set_num_threads(threads)
    print(_report.text(result))
    draw(result, args.output)
    print(f"\nPicture: {args.output.resolve()}")
    if args.json is not None:
        args.json.write_text(json.dumps(_report.numbers(result), indent=1, allow_nan=False))
        print(f"Numbers: {args.json.resolve()}")
    return 0


def measure(data: _data.Data, extent: Extent) -> _results.Result:
    """Tune, train and probe; the progress bar is silent where stderr is no terminal."""
    images, labels = data.train_images[:EXAMPLES], data.train_labels[:EXAMPLES]
    probed = _evenly(extent.steps, extent.probes)
    stops = sorted(probed | _evenly(extent.steps, EVALUATIONS))
    seeds = range(max(TUNING_SEEDS) + 1, max(TUNING_SEEDS) + 1 + extent.seeds)
    shapes = layer_shapes(network(data.train_images, seed=0))
    curves: dict[str, list[Curve]] = {name: [] for name in OPTIMIZERS}
    traces: list[_results.Trace] = []

    def probe(name: str, run: Run) -> None:
        if name == _results.CANDIDATE and run.step in probed:
            traces[-1].steps.append(run.step)
            for layer, found in layer_cosines(run.model, images, labels).items():
                traces[-1].layers.setdefault(layer, []).append(found)

    runs = len(OPTIMIZERS) * (len(extent.learning_rates) * len(TUNING_SEEDS) + extent.seeds)
    with tqdm(total=runs * extent.steps, unit="step", disable=None, leave=False) as bar:

        def progress(steps: int, doing: str) -> None:
            bar.set_description(doing, refresh=False)
            bar.update(steps)

        tuning = tune(
            data,
            extent.learning_rates,
            steps=extent.steps,
            batch_size=extent.batch_size,
            progress=progress,
        )
        lrs = {name: _results.best(losses) for name, losses in tuning.items()}
        for seed in seeds:
            traces.append(_results.Trace(seed, [], {}))
            found = compare(
                data,
                lrs,
                seed=seed,
                steps=extent.steps,
                batch_size=extent.batch_size,
                stops=stops,
                probe=probe,
                progress=progress,
            )
            for name, curve in found.items():
                curves[name].append(curve)

    settings = {
        "data": data.title,
        "training_images": len(data.train_images),
        "validation_images": len(data.validation_images),
        "evaluated_every": max(1, extent.steps / EVALUATIONS),
        "examples": len(images),
        **asdict(extent),
        "threads": torch.get_num_threads(),
        "tuning_seeds": TUNING_SEEDS,
        "weight_decay": WEIGHT_DECAY,
        "betas": BETAS,
        "torch": torch.__version__,
    }
    return _results.Result(settings, tuning, curves, shapes, traces)


def _evenly(steps: int, parts: int) -> set[int]:
    """0, the last step and evenly spaced ones between."""
    return {round(i * steps / parts) for i in range(parts + 1)}


def _extent(args: argparse.Namespace) -> Extent:
    """The options that are given, over the defaults."""
    extent = QUICK if args.quick else DEFAULT
    given = {name: getattr(args, name) for name in ("steps", "seeds", "batch_size")}
    for name, value in (given | {"threads": args.threads}).items():
        if value is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.threads > MOST_THREADS:
        raise OptionError(f"--threads must be at most {MOST_THREADS}, got {args.threads}")
    return replace(extent, **{name: value for name, value in given.items() if value is not None})


def _check_backend() -> None:
    """SHAMPOO_KERNELS_BACKEND names one that is here."""
    try:
        backends()
    except (ValueError, RuntimeError) as error:
        raise OptionError(str(error)) from None


def _check_writable(option: str, path: Path, suffixes: tuple[str, ...]) -> None:
    """An error now rather than after the training; an existing file is left as it is."""
    if path.suffix.lower() not in suffixes:
        raise OptionError(f"{option} must end in {' or '.join(suffixes)}, got {path}")
    target = Path(os.path.realpath(path))  # a link to a file that is not there yet stays a link
    new = not target.exists()
    try:
        target.open("ab").close()
    except OSError as error:
        raise OptionError(f"{option} cannot be written: {error}") from None
    if new:
        target.unlink()
