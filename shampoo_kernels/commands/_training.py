"""The training runs of the demo: one network, two optimizers, the same batches and schedule."""

import contextlib
import itertools
import math
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shampoo_kernels import Shampoo
from shampoo_kernels.commands._data import CLASSES, Data
from shampoo_kernels.study import Cosines, Unmeasurable, cosines, layer_names, sample

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "Shampoo": Shampoo,
}
WEIGHT_DECAY = 1e-2
BETAS = (0.9, 0.95)
TUNING_SEEDS = (0, 1)
WARMUP = 0.05  # of the steps, linear; then a cosine down to 0
COSINE_TOLERANCE = 1e-4  # of the factors; the optimal cosine's error is its square


@dataclass
class Curve:
    """Validation along one run; `seconds` counts forward, backward and optimizer, nothing else."""

    seed: int
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    @property
    def ms_per_step(self) -> float:
        return 1000 * self.seconds[-1] / self.steps[-1]


def network(images: Tensor, seed: int) -> nn.Sequential:
    """Two convolutions and two dense layers for images (N, channels, size, size)."""
    _, channels, size, _ = images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[tuple[str, nn.Module]] = [
            ("conv1", nn.Conv2d(channels, 16, 3, padding=1)),
            ("relu1", nn.ReLU()),
            ("pool1", nn.MaxPool2d(2)),
            ("conv2", nn.Conv2d(16, 32, 3, padding=1)),
            ("relu2", nn.ReLU()),
            ("pool2", nn.MaxPool2d(size // 4)),  # to 2 x 2
            ("flatten", nn.Flatten()),
            ("dense1", nn.Linear(128, 64)),
            ("relu3", nn.ReLU()),
            ("dense2", nn.Linear(64, CLASSES)),
        ]
        return nn.Sequential(OrderedDict(layers))


def batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices of one batch after the other, epoch after epoch; the short last batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch_size].split(batch_size)


def schedule(step: int, steps: int) -> float:
    """The learning rate of step 0, 1, ... as a share of the one that was chosen."""
    warmup = max(1, round(WARMUP * steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / warmup) * cosine


class Run:
    """One network in training with one optimizer, advanced a few steps at a time."""

    def __init__(
        self, optimizer: str, lr: float, data: Data, *, seed: int, steps: int, batch_size: int
    ) -> None:
        self.lr, self.data, self.steps = lr, data, steps
        self.model = network(data.train_images, seed)
        self.optimizer = OPTIMIZERS[optimizer](
            self.model.parameters(), lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        self.batches = batches(len(data.train_images), batch_size, seed)
        self.step = 0
        self.seconds = 0.0
        self.curve = Curve(seed)

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            index = next(self.batches)
            images, labels = self.data.train_images[index], self.data.train_labels[index]
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * schedule(self.step, self.steps)
            start = time.perf_counter()
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images), labels).backward()
            self.optimizer.step()
            self.seconds += time.perf_counter() - start
            self.step += 1

    @torch.no_grad()
    def evaluate(self) -> None:
        """Append to the curve; a loss that is not finite counts as infinite."""
        labels = self.data.validation_labels
        scores = torch.cat([self.model(x) for x in self.data.validation_images.split(500)])
        loss = float(F.cross_entropy(scores, labels))
        self.curve.steps.append(self.step)
        self.curve.seconds.append(self.seconds)
        self.curve.loss.append(loss if math.isfinite(loss) else math.inf)
        self.curve.accuracy.append(float((scores.argmax(1) == labels).float().mean()))


def tune(
    data: Data,
    learning_rates: Sequence[float],
    *,
    steps: int,
    batch_size: int,
    progress: Callable[[int, str], None],
) -> dict[str, dict[float, float]]:
    """Final validation loss of every optimizer at every learning rate: mean over TUNING_SEEDS."""
    losses: dict[str, dict[float, float]] = {name: {} for name in OPTIMIZERS}
    for lr, name in itertools.product(learning_rates, OPTIMIZERS):
        found = []
        for seed in TUNING_SEEDS:
            run = Run(name, lr, data, seed=seed, steps=steps, batch_size=batch_size)
            while run.step < steps:
                count = min(10, steps - run.step)
                run.advance(count)
                progress(count, f"tuning {name}, lr {lr:g}")
            run.evaluate()
            found.append(run.curve.loss[-1])
        losses[name][lr] = statistics.fmean(found)
    return losses


def compare(
    data: Data,
    lrs: dict[str, float],
    *,
    seed: int,
    steps: int,
    batch_size: int,
    stops: list[int],
    probe: Callable[[str, Run], None],
    progress: Callable[[int, str], None],
) -> dict[str, Curve]:
    """Train with every optimizer at once, in turns of a few steps: noise of the machine hits all.

    At each of the steps in `stops` every run is evaluated and shown to `probe`, outside the clock.
    """
    runs = {
        name: Run(name, lr, data, seed=seed, steps=steps, batch_size=batch_size)
        for name, lr in lrs.items()
    }
    for stop in stops:
        for name, run in runs.items():
            count = stop - run.step
            run.advance(count)
            run.evaluate()
            probe(name, run)
            progress(count, f"training, seed {seed}")
    return {name: run.curve for name, run in runs.items()}


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(m, n) of the gradient of every layer that `layer_cosines` has."""
    return {
        name.removesuffix(".weight"): (p.shape[0], p[0].numel())
        for name, p in model.named_parameters()
        if p.ndim > 1
    }


def layer_cosines(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Cosines]:
    """For every layer, how close E[ggᵀ] over these examples is to three Kronecker products.

    A layer whose gradients all vanish, or are not finite, has no cosine: NaN.
    """
    found = dict.fromkeys(layer_names(model), Cosines(math.nan, math.nan, math.nan))
    for layer in found:
        with contextlib.suppress(Unmeasurable):
            grads = sample(model, images, labels, layers=layer)[layer]
            found[layer] = cosines(grads, tol=COSINE_TOLERANCE)
    return found
