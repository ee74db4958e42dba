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
SPREAD: dict[str, Any] = {"alpha": 0.2, "linewidth": 0}


def overview(runs: Runs) -> bytes:
    """Rows: the two views; columns: the settings, by their first layer."""
    return _grid([(setting, setting.layers[0]) for setting in runs], runs, by_setting=True)


def layers(setting: Setting, runs: Runs) -> bytes:
    """Rows: the two views; columns: the layers of one setting."""
    return _grid([(setting, layer) for layer in setting.layers], runs, by_setting=False)


def _grid(columns: list[tuple[Setting, str]], runs: Runs, *, by_setting: bool) -> bytes:
    figure = Figure(figsize=(max(3.0 * len(columns), 6.5), 5.4), dpi=110, layout="constrained")
    panels = figure.subplots(2, len(columns), sharey=True, squeeze=False)
    for i, view in enumerate(VIEWS):
        for j, (setting, layer) in enumerate(columns):
            axes = panels[i][j]
            shape = _along(axes, runs[setting], view, layer)
            if i == 0:
                title = setting.name if by_setting else f"layer {layer}"
                axes.set_title(f"{title}\n{shape}", fontsize="medium")
            else:
                axes.set_xlabel("step")
        panels[i][0].set_ylabel(f"{VIEWS[view]} view\ncosine with H")
    panels[0][0].set_ylim(0, 1.03)
    handles, labels = panels[0][0].get_legend_handles_labels()
    for other in panels.flat:
        for handle, label in zip(*other.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return _png(figure)


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
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    _tidy(axes)
    return shape


def tricks(runs: Runs) -> bytes:
    """Cosine of Shampoo² against the batch size, real and sampled labels, at both points."""
    figure = Figure(figsize=(max(3.0 * len(runs), 6.5), 5.4), dpi=110, layout="constrained")
    panels = figure.subplots(2, len(runs), sharey=True, squeeze=False)
    for j, (setting, found) in enumerate(runs.items()):
        for i, step in enumerate(setting.trick_points):
            axes = panels[i][j]
            for kind, (colour, marker) in LABEL_STYLES.items():
                _against_batch_size(axes, found, setting.layers[0], step, kind, colour, marker)
            axes.set_xscale("log", base=2)
            axes.set_xticks(setting.batch_sizes, [str(size) for size in setting.batch_sizes])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_title(f"{setting.name}, step {step}" if i == 0 else f"step {step}",
                           fontsize="medium")  # fmt: skip
            _tidy(axes)
        panels[1][j].set_xlabel("batch size")
    for row in panels:
        row[0].set_ylabel("cosine of Shampoo²\nwith Gauss–Newton")
    panels[0][0].set_ylim(0, 1.03)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return _png(figure)


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


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.5, alpha=0.4)


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
