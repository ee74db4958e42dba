"""What the demo measured, and the comparison that its tables, picture and JSON are made from."""

import math
import statistics
from dataclasses import dataclass

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

    settings: dict[str, object]
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
        of = statistics.median if self.middle == "median" else statistics.fmean
        return of(self.values[optimizer])

    def cell(self, optimizer: str) -> str:
        typical, values = self.typical(optimizer), self.values[optimizer]
        if math.isinf(typical):
            return "not reached" if self.middle == "median" else "diverged"
        text = format(typical, self.form)
        if self.middle == "mean" and len(values) > 1:
            text += f" ± {format(statistics.stdev(values), self.form)}"
        return text + self.unit

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
    """AdamW's final validation loss: the median over the seeds."""
    return statistics.median(curve.loss[-1] for curve in result.curves[BASELINE])


def first_below(curve: Curve, loss: float) -> int | None:
    """Index of the first evaluation at or below this loss; an infinite one cannot be reached."""
    return next((i for i, value in enumerate(curve.loss) if value <= loss < math.inf), None)


def comparison(result: Result) -> list[Row]:
    """The rows of the table that compares the two optimizers."""

    def gather(measure) -> dict[str, list[float]]:
        return {name: [measure(c) for c in curves] for name, curves in result.curves.items()}

    goal = target(result)

    def reach(axis: str):
        def measure(curve: Curve) -> float:
            index = first_below(curve, goal)
            return math.inf if index is None else getattr(curve, axis)[index]

        return measure

    return [
        Row(f"steps to loss {goal:.4f}", gather(reach("steps")), ".0f", middle="median"),
        Row(f"seconds to loss {goal:.4f}", gather(reach("seconds")), ".2f", " s", middle="median"),
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
