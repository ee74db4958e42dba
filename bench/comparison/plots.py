"""The picture of a task: loss against steps and against seconds."""

import io
from collections.abc import Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from comparison.results import Row, baseline
from comparison.tasks import Task
from shampoo_kernels.commands._report import seeds_text

# Okabe and Ito's, which every kind of colour vision tells apart; then again, dashed.
COLOURS = ("#D55E00", "#E69F00", "#009E73", "#CC79A7", "#999999", "#0072B2", "#56B4E9", "#000000")
LINES = ("-", "--", ":")
CLOSEST = 0.1  # the vertical axis starts at the loss of the slowest after this share of the steps


def draw(task: Task, made: Sequence[Row]) -> bytes:
    """A PNG: mean over the seeds, lowest to highest shaded; methods that fail are left out."""
    figure = Figure(figsize=(11, 5.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    drawn = [(i, row) for i, row in enumerate(made) if not any(run.failed for run in row.runs)]
    for axes, against in zip(panels, ("steps", "seconds"), strict=True):
        for i, row in drawn:
            _curve(axes, row, against, COLOURS[i % len(COLOURS)], LINES[i // len(COLOURS) % 3])
        base = baseline(made)
        if base:
            label = "lowest loss of AdamW"
            axes.axhline(base.lowest, color="#555555", linestyle="--", linewidth=1, label=label)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    if drawn:
        _zoom(panels[0], [row for _, row in drawn])
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    panels[0].set(xlabel="step", ylabel="validation loss")
    panels[1].set(xlabel="seconds (forward, backward, optimizer)")
    seeds = seeds_text(range(max((len(row.runs) for row in made), default=0)))
    figure.suptitle(f"{task.title}: mean over {seeds}, lowest to highest shaded")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _curve(axes: Axes, row: Row, against: str, colour: str, style: str) -> None:
    x = [fmean(values) for values in zip(*(getattr(r, against) for r in row.runs), strict=True)]
    losses = list(zip(*(run.loss for run in row.runs), strict=True))
    low, high = [min(values) for values in losses], [max(values) for values in losses]
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    label = f"{row.method.name}, lr {row.lr:g}"
    mean = [fmean(values) for values in losses]
    axes.plot(x, mean, color=colour, linestyle=style, linewidth=1.8, label=label)


def _zoom(axes: Axes, drawn: Sequence[Row]) -> None:
    """The first steps would flatten all the others."""
    runs = [run for row in drawn for run in row.runs]
    early = max(1, round(CLOSEST * len(runs[0].steps)))
    top, bottom = max(run.loss[early] for run in runs), min(run.lowest for run in runs)
    axes.set_ylim(bottom - 0.05 * (top - bottom), top)
