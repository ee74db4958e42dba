"""What the demo measured, and the comparison that its tables, picture and JSON are made from."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shampoo_kernels.commands._training import Curve
from shampoo_kernels.study.kronecker import Cosines

BASELINE, CANDIDATE = "AdamW", "Shampoo"
APPROXIMATIONS = {"optimal": "optimal", "shampoo_squared": "Shampoo²", "shampoo": "Shampoo"}


@dataclass
class Trace:
    """Cosines of every layer along one training run."""

    seed: int
    steps: list[int]
    layers: dict[str, list[Cosines]]


@dataclass
class Result:
    """Everything the demo measured; tables, summary, plot and JSON are made from it."""

    settings: dict[str, Any]
    tuning: dict[str, dict[float, float]]  # optimizer -> learning rate -> final validation loss
    curves: dict[str, list[Curve]]  # optimizer -> one curve per seed
    shapes: dict[str, tuple[int, int]]  # layer -> (m, n) of its gradient
    traces: list[Trace]  # one per seed


@dataclass
class Row:
    """One measure of the comparison, with a value per seed for each optimizer."""

    name: str
    values: dict[str, list[float]]
    form: str
    unit: str = ""
    higher_is_better: bool = False
    middle: str = "mean"  # or "median", which tolerates runs that never get there (infinity)

    def typical(self, optimizer: str) -> float:
        of = statistics.median_high if self.middle == "median" else statistics.fmean
        return of(self.values[optimizer])

    def cell(self, optimizer: str) -> str:
        typical, values = self.typical(optimizer), self.values[optimizer]
        finite = sum(map(math.isfinite, values))
        if self.middle == "mean":
            text = "diverged" if math.isinf(typical) else format(typical, self.form)
            if 1 < finite == len(values):
                text += f" ± {format(statistics.stdev(values), self.form)}"
        else:
            text = "not reached" if math.isinf(typical) else format(typical, self.form)
            if 0 < finite < len(values):
                text += f" (in {finite} of {len(values)})"
        return text + (self.unit if finite == len(values) else "")

    def better(self) -> str:
        """Who is ahead, where that is so in every seed (same weights and batches); "" where not."""
        ahead = self.ahead()
        return next((name for name in ahead if ahead[name] == len(self.values[name])), "")

    def ahead(self) -> dict[str, int]:
        """In how many seeds each optimizer is strictly better than the other."""
        sign = 1 if self.higher_is_better else -1
        pairs = list(zip(self.values[BASELINE], self.values[CANDIDATE], strict=True))
        return {
            BASELINE: sum(sign * a > sign * b for a, b in pairs),
            CANDIDATE: sum(sign * a < sign * b for a, b in pairs),
        }

    def verdict(self) -> str:
        """`better` in words, or how the seeds disagree."""
        counts = ", ".join(f"{name} in {count}" for name, count in self.ahead().items() if count)
        return self.better() or (f"undecided ({counts})" if counts else "equal")


def best(losses: dict[float, float]) -> float:
    """The learning rate with the lowest loss."""
    return min(losses, key=losses.__getitem__)


def target(result: Result) -> float:
    """The final validation loss of AdamW, median over the seeds."""
    return statistics.median(curve.loss[-1] for curve in result.curves[BASELINE])


def at_loss(curve: Curve, axis: str, goal: float) -> float:
    """`steps` or `seconds` at the first evaluation at or below `goal`; infinity: not reached."""
    found = zip(getattr(curve, axis), curve.loss, strict=True)
    return next((float(x) for x, loss in found if loss <= goal < math.inf), math.inf)


def comparison(result: Result) -> list[Row]:
    """The rows of the table that compares the two optimizers.

    What is to be reached is AdamW's final validation loss of the same seed.
    """

    def gather(measure: Callable[[Curve], float]) -> dict[str, list[float]]:
        return {name: [measure(c) for c in curves] for name, curves in result.curves.items()}

    def reach(axis: str) -> dict[str, list[float]]:
        goals = [curve.loss[-1] for curve in result.curves[BASELINE]]
        return {
            name: [at_loss(curve, axis, goal) for curve, goal in zip(curves, goals, strict=True)]
            for name, curves in result.curves.items()
        }

    return [
        Row(f"steps to {BASELINE}'s loss", reach("steps"), ".0f", middle="median"),
        Row(f"seconds to {BASELINE}'s loss", reach("seconds"), ".2f", " s", middle="median"),
        Row("final validation loss", gather(lambda c: c.loss[-1]), ".4f"),
        Row(
            "final validation accuracy",
            gather(lambda c: 100 * c.accuracy[-1]),
            ".2f",
            " %",
            higher_is_better=True,
        ),
        Row("milliseconds a step", gather(lambda c: c.ms_per_step), ".2f"),
    ]


def final_cosines(result: Result) -> dict[str, Cosines]:
    """Per layer, the median over the seeds of each cosine at the last step."""
    return {
        layer: Cosines(*(statistics.median(values) for values in zip(*ends, strict=True)))
        for layer in result.shapes
        for ends in [[trace.layers[layer][-1] for trace in result.traces]]
    }
