"""The pictures of the study: cosines along training, and against batch size, from stored runs."""

import io
import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from shampoo_kernels.commands._plots import COSINE_STYLES
from shampoo_kernels.commands.study.runs import VIEWS
from shampoo_kernels.commands.study.settings import Setting
from shampoo_kernels.study import NAMES

Runs = dict[Setting, list[dict[str, Any]]]
STYLES = COSINE_STYLES | {"kfac": ("#009E73", "v", 1.6)}
LABEL_STYLES = {"sampled": ("#0072B2", "o"), "real": ("#D55E00", "s")}
COLUMNS = 4  # panels side by side: more are too small on a page
SPREAD: dict[str, Any] = {"alpha": 0.2, "linewidth": 0}


def overview(runs: Runs) -> bytes:
    """Rows: the two views; columns: the settings, by their first layer."""
    return _grid([(setting, setting.layers[0]) for setting in runs], runs, by_setting=True)


def layers(setting: Setting, runs: Runs) -> bytes:
    """Rows: the two views; columns: the layers of one setting."""
    return _grid([(setting, layer) for layer in setting.layers], runs, by_setting=False)


def _grid(columns: list[tuple[Setting, str]], runs: Runs, *, by_setting: bool) -> bytes:
    figure, panels = _panels(len(columns))
    for (setting, layer), pair in zip(columns, panels, strict=True):
        for axes, view in zip(pair, VIEWS, strict=True):
            shape = _along(axes, runs[setting], view, layer)
            axes.set_xlabel("step")
            if view == "gauss_newton":
                title = setting.name if by_setting else f"layer {layer}"
                axes.set_title(f"{title}\n{shape}", fontsize="medium")
    for pair in panels[::COLUMNS]:
        for axes, name in zip(pair, VIEWS.values(), strict=True):
            axes.set_ylabel(f"{name} view\ncosine with H")
    return _finished(figure, panels, legend_columns=4)


def _panels(count: int) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """Pairs of panels, one above the other, at most COLUMNS of them side by side."""
    columns, blocks = min(count, COLUMNS), -(-count // COLUMNS)
    figure = Figure(figsize=(max(2.9 * columns, 6.5), 5.6 * blocks), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 * blocks, columns, sharey=True, squeeze=False)
    pairs = [
        (axes[2 * block][column], axes[2 * block + 1][column])
        for block in range(blocks)
        for column in range(columns)
    ]
    for pair in pairs[count:]:
        for panel in pair:
            panel.remove()
    pairs[0][0].set_ylim(0, 1.03)
    return figure, pairs[:count]


def _finished(figure: Figure, panels: list[tuple[Axes, Axes]], legend_columns: int) -> bytes:
    """With one legend for all panels, as PNG."""
    entries: dict[str, Any] = {}
    for axes in (axes for pair in panels for axes in pair):
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=legend_columns,
        frameon=False,
    )  # fmt: skip
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _along(axes: Axes, runs: list[dict[str, Any]], view: str, layer: str) -> str:
    """Mean over the seeds, lowest to highest shaded; returns the shape of the layer."""
    shape = ""
    for name, (colour, marker, width) in STYLES.items():
        by_step: dict[int, list[float]] = {}
        for run in runs:
            for row in run["rows"]:
                key = f"cosine_{name}"
                if (row["view"], row["layer"]) == (view, layer) and key in row:
                    by_step.setdefault(row["step"], []).append(row[key])
                    shape = f"{row['m']} × {row['n']}"
        if not by_step:
            continue
        steps = sorted(by_step)
        values = [by_step[step] for step in steps]
        axes.fill_between(
            steps, [min(v) for v in values], [max(v) for v in values], color=colour, **SPREAD
        )
        axes.plot(
            steps, [statistics.fmean(v) for v in values], color=colour, marker=marker,
            markersize=width + 2.2, linewidth=width, label=NAMES[name],
        )  # fmt: skip
    last = max(row["step"] for run in runs for row in run["rows"])
    axes.set_xlim(-0.04 * last, 1.04 * last)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return shape


def tricks(runs: Runs) -> bytes:
    """Cosine of Shampoo² against the batch size, real and sampled labels, at both points."""
    figure, panels = _panels(len(runs))
    for (setting, found), pair in zip(runs.items(), panels, strict=True):
        for axes, step in zip(pair, setting.trick_points, strict=True):
            for kind, (colour, marker) in LABEL_STYLES.items():
                _against_batch_size(axes, found, setting.layers[0], step, kind, colour, marker)
            axes.set_xscale("log", base=2)
            axes.set_xticks(setting.batch_sizes, [str(size) for size in setting.batch_sizes])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_title(f"{setting.name}, step {step}", fontsize="medium")
            axes.set_xlabel("batch size")
    for pair in panels[::COLUMNS]:
        for axes in pair:
            axes.set_ylabel("cosine of Shampoo²\nwith Gauss–Newton")
    return _finished(figure, panels, legend_columns=2)


def _against_batch_size(
    axes: Axes,
    runs: list[dict[str, Any]],
    layer: str,
    step: int,
    kind: str,
    colour: str,
    marker: str,
) -> None:
    """Points with bars from the lowest to the highest seed; dashed: infinitely many batches."""
    rows = [
        row
        for run in runs
        for row in run["tricks"]
        if (row["layer"], row["step"], row["labels"]) == (layer, step, kind)
    ]
    sizes = sorted({row["batch_size"] for row in rows})
    if not sizes:
        return
    measured, expected = (
        [[row[key] for row in rows if row["batch_size"] == size] for size in sizes]
        for key in ("shampoo_squared", "expectation")
    )
    means = [statistics.fmean(values) for values in measured]
    bars = [
        [mean - min(values) for mean, values in zip(means, measured, strict=True)],
        [max(values) - mean for mean, values in zip(means, measured, strict=True)],
    ]
    axes.errorbar(sizes, means, bars, color=colour, marker=marker, linewidth=1.8, capsize=3,
                  label=f"{kind} labels")  # fmt: skip
    axes.plot(
        sizes, [statistics.fmean(values) for values in expected], color=colour, linestyle="--",
        linewidth=1.2, label=f"{kind} labels, infinitely many batches",
    )  # fmt: skip
