"""The picture of the demo: loss curves above, cosines of every layer along training below."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from shampoo_kernels.commands._report import seeds_text, steps_text
from shampoo_kernels.commands._results import (
    APPROXIMATIONS,
    BASELINE,
    CANDIDATE,
    Result,
    best,
    target,
)

# Okabe and Ito's colours, which every kind of colour vision tells apart; markers help in print.
OPTIMIZER_COLOURS = {BASELINE: "#D55E00", CANDIDATE: "#0072B2"}
COSINE_STYLES = {  # the optimum is the widest line: Shampoo² often lies on it
    "optimal": ("#000000", "o", 3.6),
    "shampoo_squared": ("#56B4E9", "s", 2.0),
    "shampoo": ("#E69F00", "^", 2.0),
}
THIN: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.35}
THICK: dict[str, Any] = {"linewidth": 2.2}


def draw(result: Result, path: Path) -> None:
    """Write the picture of `result` to `path`, whose suffix is the format."""
    columns = len(result.shapes)
    figure = Figure(figsize=(3.1 * columns, 8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    settings = result.settings
    figure.suptitle(
        f"AdamW and Shampoo on {settings['data']}: {steps_text(settings['steps'])}, "
        f"{seeds_text(trace.seed for trace in result.traces)}"
    )
    above, below = figure.subfigures(2, 1, height_ratios=(1.2, 1), squeeze=False)[:, 0]
    by_step, by_second = above.subplots(1, 2, sharey=True)
    _draw_losses(by_step, result, "steps")
    _draw_losses(by_second, result, "seconds")
    by_step.set(xlabel="step", ylabel="validation loss")
    by_second.set(xlabel="seconds (forward, backward, optimizer)")
    by_step.legend(loc="upper right")

    below.suptitle(
        f"Cosine between E[ggᵀ] over {settings['examples']} examples and three Kronecker products, "
        "along Shampoo's training",
        fontsize="medium",
    )
    panels = below.subplots(1, columns, sharey=True, squeeze=False)[0]
    for panel, layer in zip(panels, result.shapes, strict=True):
        _draw_cosines(panel, result, layer)
    panels[0].set_ylabel("cosine")
    panels[0].set_ylim(0, 1.02)
    panels[-1].legend(loc="lower right")
    figure.savefig(path)


def _draw_losses(axes: Axes, result: Result, against: str) -> None:
    """Every seed thin, the median over the seeds thick, AdamW's final loss dashed."""
    for name, curves in result.curves.items():
        colour = OPTIMIZER_COLOURS[name]
        for curve in curves:
            axes.plot(getattr(curve, against), curve.loss, color=colour, **THIN)
        x = _median([getattr(curve, against) for curve in curves])
        label = f"{name}, lr {best(result.tuning[name]):g}"
        axes.plot(x, _median([c.loss for c in curves]), color=colour, label=label, **THICK)
    goal = target(result)
    if math.isfinite(goal):
        axes.axhline(
            goal,
            color="#555555",
            linestyle="--",
            linewidth=1.2,
            label=f"AdamW's final loss, {goal:.4f}",
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(left=0)
    _tidy(axes)


def _draw_cosines(axes: Axes, result: Result, layer: str) -> None:
    for name, (colour, marker, width) in COSINE_STYLES.items():
        found = [[getattr(c, name) for c in trace.layers[layer]] for trace in result.traces]
        steps = result.traces[0].steps
        for values in found:
            axes.plot(steps, values, color=colour, **THIN)
        label = APPROXIMATIONS[name]
        axes.plot(
            steps,
            _median(found),
            color=colour,
            marker=marker,
            markersize=width + 2.5,
            linewidth=width,
            label=label,
        )
    m, n = result.shapes[layer]
    axes.set_title(f"{layer} ({m} × {n})", fontsize="medium")
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    _tidy(axes)


def _median(curves: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(values) for values in zip(*curves, strict=True)]


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.5, alpha=0.4)
