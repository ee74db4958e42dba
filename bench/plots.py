"""The plots of a run: where it is faster, errors against time, how cost grows, which backend."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from page import op_of, seconds

# op in the results -> the name on the plot, and the baseline that it is held against
GROWN = {
    "growth: gram": ("gram_ema_", "baddbmm_"),
    "growth: root": ("inverse_root, p = 2", "torch.linalg.eigh"),
    "growth: preconditioning": ("precondition", "bmm, bmm, sum"),
}
# Okabe and Ito's colours, which every kind of colour vision tells apart; markers help in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osv^D<>P*X"


def draw_all(results: dict, folder: Path) -> dict[str, str]:
    """Draw what the rows allow; {file name: what it shows}."""
    rows: dict[str, list[dict]] = {}
    for row in results["benchmarks"]:
        rows.setdefault(op_of(row), []).append(row)
    grown = {op: rows[op] for op in GROWN if op in rows}
    roots = rows.get("inverse_root: roots", [])
    tables = results.get("tables", {})
    counted = tables.get("torch operations a step", [])
    shared = tables.get("ranks: what the busiest has of a step", [])
    drawn = {}
    for name, what, draw, data in (
        ("speedup", "Times faster than the torch one-liner, by n and number of blocks",
         draw_speedup, grown),
        ("roots", "Error against time of all ways to an inverse root; what fails is named",
         draw_roots, roots),
        ("growth", "How cost grows, with fitted slopes in the logarithms", draw_growth, grown),
        ("layers", "Torch operations a step as layers are added", draw_layers, counted),
        ("ranks", "What is left to the busiest of several processes, against one",
         draw_ranks, shared[1:] and shared),
        ("crossover", "Time of our reference over that of ours: above 1 the kernels win",
         draw_crossover, grown),
    ):  # fmt: skip
        if data:
            figure = draw(data)
            FigureCanvasAgg(figure)
            figure.savefig(folder / f"{name}.png")
            drawn[f"{name}.png"] = what
    return drawn


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The exponent a of y ~ x^a: least squares in the logarithms."""
    u, v = ([math.log(x) for x in values] for values in (xs, ys))
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    spread = sum((a - mean_u) ** 2 for a in u)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / spread


def _panels(columns: int, rows: int = 1, width: float = 4.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, 3.8 * rows), dpi=110, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _cells(rows: list[dict], name: str) -> dict[tuple[int, int], float]:
    """{(blocks, n): times of the baseline over ours}."""
    return {
        (row["extra_info"]["sizes"]["batch"], row["extra_info"]["sizes"]["n"]):
            seconds(row["extra_info"]["baselines"][name]) / row["stats"]["median"]
        for row in rows
        if name in row["extra_info"]["baselines"]
    }  # fmt: skip


def draw_speedup(grown: dict[str, list[dict]]) -> Figure:
    figure, panels = _panels(len(grown))
    for panel, (op, rows) in zip(panels, grown.items(), strict=True):
        title, baseline = GROWN[op]
        cells = _cells(rows, baseline)
        batches, sizes = (sorted({key[i] for key in cells}) for i in (0, 1))
        values = [
            [math.log2(cells.get((b, n), math.nan) or math.nan) for n in sizes] for b in batches
        ]
        panel.imshow(values, origin="lower", cmap="RdBu", vmin=-3, vmax=3, aspect="auto")
        for (b, n), ratio in cells.items():
            colour = "white" if abs(math.log2(ratio)) > 2 else "black"
            panel.text(sizes.index(n), batches.index(b), f"{ratio:.1f}", ha="center", va="center",
                       color=colour, fontsize=8)  # fmt: skip
        panel.set(title=f"{title}\nover {baseline}", xlabel="n", ylabel="blocks")
        panel.set_xticks(range(len(sizes)), map(str, sizes))
        panel.set_yticks(range(len(batches)), map(str, batches))
    return figure


def draw_roots(rows: list[dict]) -> Figure:
    keys = sorted({_root_key(row) for row in rows})
    columns = len({condition for _, condition in keys})
    figure, panels = _panels(columns, len(keys) // columns, width=5.0)
    every = list(dict.fromkeys(name for row in rows for name in row["extra_info"]["errors"]))
    handles: dict[str, PathCollection] = {}
    for panel, key in zip(panels, keys, strict=True):
        row = next(row for row in rows if _root_key(row) == key)
        info = row["extra_info"]
        times = {"ours": row["stats"]["median"]}
        times |= {name: seconds(t) for name, t in info["baselines"].items()}
        for name, error in info["errors"].items():
            i = every.index(name)
            failed = name in info["failed"]
            marker = "x" if failed else MARKERS[i % len(MARKERS)]
            drawn = panel.scatter(
                1e3 * times[name], max(error, 1e-9), s=90 if name == "ours" else 36, marker=marker,
                color=COLOURS[i % len(COLOURS)],
            )  # fmt: skip
            if not failed:
                handles[name] = drawn
        panel.set(xscale="log", yscale="log", xlabel="ms", ylabel="error")
        panel.set_title(f"p = {key[0]:.0f}, condition {key[1]:.0e}")
    found = {name: handles[name] for name in every if name in handles}
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=3, title="a cross fails"
    )
    return figure


def _root_key(row: dict) -> tuple[float, float]:
    return row["extra_info"]["sizes"]["p"], row["extra_info"]["sizes"]["condition"]


def draw_growth(grown: dict[str, list[dict]]) -> Figure:
    figure, (by_size, by_blocks) = _panels(2, width=5.5)
    for i, (op, rows) in enumerate(grown.items()):
        title, baseline = GROWN[op]
        smallest = min(row["extra_info"]["sizes"]["n"] for row in rows)
        for panel, along, fixed in (
            (by_size, "n", ("batch", 1)),
            (by_blocks, "batch", ("n", smallest)),
        ):
            points = sorted(
                (r["extra_info"]["sizes"][along], r["stats"]["median"],
                 seconds(r["extra_info"]["baselines"].get(baseline, math.nan)))
                for r in rows if r["extra_info"]["sizes"][fixed[0]] == fixed[1]
            )  # fmt: skip
            if len(points) < 2:
                continue
            xs, ours, theirs = zip(*points, strict=True)
            for ys, name, style in ((ours, title, "-"), (theirs, baseline, "--")):
                fitted = slope(xs[-4:], ys[-4:])
                panel.plot(xs, [1e3 * y for y in ys], style, marker=MARKERS[i], color=COLOURS[i],
                           label=f"{name}: {fitted:.2f}")  # fmt: skip
    by_size.set(xlabel="n, one block", title="size; slopes of the last four")
    by_blocks.set(xlabel="blocks, smallest n", title="number of blocks; slopes of the last four")
    for panel in (by_size, by_blocks):
        panel.set(xscale="log", yscale="log", ylabel="ms")
        panel.legend(fontsize=7)
    return figure


def draw_layers(rows: list[dict]) -> Figure:
    figure, (panel,) = _panels(1, width=5.5)
    for i, row in enumerate(rows):
        counts = {int(k.split()[0]): v for k, v in row.items() if k.endswith(" layers")}
        xs, ys = zip(*sorted(counts.items()), strict=True)
        panel.plot(xs, ys, marker=MARKERS[i], color=COLOURS[i],
                   label=f"{row['optimizer']}: {slope(xs[-2:], ys[-2:]):.2f}")  # fmt: skip
    panel.set(xscale="log", yscale="log", xlabel="layers", ylabel="torch operations a step")
    panel.set_title("slope of the last two")
    panel.legend(fontsize=7)
    return figure


def draw_ranks(rows: list[dict]) -> Figure:
    """Every column over what one rank has of it; what is sent, of which one has none, over the
    least."""
    figure, (panel,) = _panels(1, width=5.5)
    columns = [name for name in rows[0] if name not in ("ranks", "collectives")]
    for i, name in enumerate(columns):
        points = [(row["ranks"], row[name]) for row in rows if row[name]]
        xs, ys = zip(*points, strict=True)
        label = f"{name}: {slope(xs, ys):.2f}" if len(xs) > 1 else name
        panel.plot(xs, [y / ys[0] for y in ys], marker=MARKERS[i], color=COLOURS[i], label=label)
    panel.set(xscale="log", yscale="log", xlabel="ranks", ylabel="of the busiest, relative")
    panel.set_title("slopes")
    panel.set_xticks([row["ranks"] for row in rows], [str(row["ranks"]) for row in rows])
    panel.minorticks_off()
    panel.legend(fontsize=7)
    return figure


def draw_crossover(grown: dict[str, list[dict]]) -> Figure:
    figure, panels = _panels(len(grown))
    for panel, (op, rows) in zip(panels, grown.items(), strict=True):
        cells = _cells(rows, "our reference")
        for i, batch in enumerate(sorted({b for b, _ in cells})):
            points = sorted((n, ratio) for (b, n), ratio in cells.items() if b == batch)
            panel.plot(*zip(*points, strict=True), marker=MARKERS[i % len(MARKERS)],
                       color=COLOURS[i % len(COLOURS)], label=f"{batch} blocks")  # fmt: skip
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(
            title=GROWN[op][0], xlabel="n", ylabel="reference / ours", xscale="log", yscale="log"
        )
        panel.legend(fontsize=6)
    return figure
