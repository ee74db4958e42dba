"""What the runs say: steps and seconds to AdamW's loss, and the Markdown table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from comparison import search
from comparison.methods import BASELINES, OTHERS_LR, REFRESH, Method
from comparison.runs import Key, Run
from comparison.search import Found
from comparison.tasks import Task
from shampoo_kernels.commands._report import seeds_text

HEADER = (
    "method", "learning rate", "lowest loss", "final loss", "accuracy, %", "steps to AdamW's",
    "seconds to AdamW's", "ms a step",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A method at its best learning rate on one task: the runs of all seeds, in their order."""

    method: Method
    lr: float
    at_edge: bool
    runs: list[Run]

    @property
    def lowest(self) -> float:
        return fmean(run.lowest for run in self.runs)


def rows(task: Task, methods: Sequence[Method], seeds: int, found: Found) -> list[Row]:
    """One a method whose runs are all there."""
    made = []
    for method in methods:
        best = search.chosen(task, method, found)
        if best is None or search.wanted(task, method, seeds, found):
            continue
        runs = [found[Key(task, method, best[0], seed)] for seed in range(seeds)]
        made.append(Row(method, *best, runs))
    return made


def baseline(made: Sequence[Row]) -> Row | None:
    """The better AdamW, by its mean lowest loss; None if there is none that did not fail."""
    own = [row for row in made if row.method.name in BASELINES and math.isfinite(row.lowest)]
    return min(own, key=lambda row: row.lowest, default=None)


def reached(run: Run, goal: float) -> tuple[float, float] | None:
    """Steps and seconds at which the validation loss first comes down to `goal`, on straight lines
    between evaluations; None: never."""
    for i, loss in enumerate(run.loss):
        if loss > goal:
            continue
        if i == 0:
            return float(run.steps[0]), run.seconds[0]
        share = (run.loss[i - 1] - goal) / (run.loss[i - 1] - loss)
        steps, seconds = (v[i - 1] + share * (v[i] - v[i - 1]) for v in (run.steps, run.seconds))
        return steps, seconds
    return None


def cells(row: Row, goals: Sequence[float] | None, steps: int) -> list[str]:
    """One for each column of HEADER; `goals` are the lowest losses of the baseline, by seed."""
    lr = f"{row.lr:g}" + (" (edge)" if row.at_edge else "")
    finished = [run for run in row.runs if not run.failed]
    if len(finished) < len(row.runs):
        reasons = "; ".join(dict.fromkeys(run.failed for run in row.runs if run.failed))
        failing = f"**fails** in {len(row.runs) - len(finished)} of {len(row.runs)}: {reasons}"
        return [row.method.name, lr, failing, *[""] * (len(HEADER) - 3)]
    accuracy = [100 * run.accuracy[-1] for run in finished if run.accuracy]
    return [
        row.method.name,
        lr,
        spread([run.lowest for run in finished], 3),
        spread([run.loss[-1] for run in finished], 3),
        spread(accuracy, 1) if accuracy else "",
        *_to_goals(row, goals, steps),
        f"{median(run.ms_per_step for run in finished):.1f}",
    ]


def _to_goals(row: Row, goals: Sequence[float] | None, steps: int) -> list[str]:
    if goals is None:
        return ["", ""]
    points = [reached(run, goal) for run, goal in zip(row.runs, goals, strict=True)]
    hit = [point for point in points if point is not None]
    if not hit:
        return ["not reached", "not reached"]
    note = "" if len(hit) == len(points) else f", in {len(hit)} of {len(points)}"
    count, seconds = (fmean(values) for values in zip(*hit, strict=True))
    return [f"{count:.0f} ({100 * count / steps:.0f} %){note}", f"{seconds:.1f}{note}"]


def spread(values: Sequence[float], digits: int) -> str:
    """ "1.853 ± 0.004": mean and sample standard deviation; of one value, itself."""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.{digits}f}"


def table(task: Task, made: Sequence[Row]) -> list[str]:
    """Markdown; the lowest mean loss in bold, whoever has it."""
    base = baseline(made)
    goals = [run.lowest for run in base.runs] if base else None
    leader = min(made, key=lambda row: row.lowest, default=None)
    shown = [i for i, name in enumerate(HEADER) if name != "accuracy, %" or _has_accuracy(made)]
    lines = [_line([HEADER[i] for i in shown]), _line(["---"] * len(shown))]
    for row in made:
        texts = cells(row, goals, task.steps)
        if row is leader and math.isfinite(row.lowest):
            texts[2] = f"**{texts[2]}**"
        lines.append(_line([texts[i] for i in shown]))
    return lines


def _has_accuracy(made: Sequence[Row]) -> bool:
    return any(run.accuracy for row in made for run in row.runs)


def search_table(task: Task, methods: Sequence[Method], found: Found) -> list[str]:
    """Markdown: the lowest loss at every learning rate that was searched."""
    losses = {method.name: search.losses_of(task, method, found) for method in methods}
    rates = sorted({lr for tried in losses.values() for lr in tried})
    lines = [_line(["method", *(f"{lr:g}" for lr in rates)]), _line(["---"] * (len(rates) + 1))]
    for name, tried in losses.items():
        lines.append(_line([name, *(_loss(tried.get(lr)) for lr in rates)]))
    return lines


def _loss(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if math.isfinite(value) else "fails"


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def markdown(
    tasks: Sequence[Task], methods: Sequence[Method], seeds: int, found: Found, machine: str
) -> str:
    """All tasks, with what was done to whom."""
    lines = [
        machine,
        "",
        f"Validation loss, mean ± standard deviation over {seeds_text(range(seeds))}; "
        "the same weights at the start, the same batches and the same schedule for every method. "
        f"{search.RULE}",
        "",
        f"Hidden matrices run the method; embeddings, first and last layers, norms and biases run "
        f"AdamW at {OTHERS_LR:g}. “AdamW” alone runs the whole model at the searched rate. SOAP "
        f"and DASH are pytorch_optimizer's with its defaults, Muon is torch's with "
        f"match_rms_adamw; all that have roots or bases refresh them every {REFRESH} steps.",
        "",
        "To AdamW's: the first time the loss is as low as the lowest of the better AdamW with the "
        "same seed, on straight lines between evaluations, mean over the seeds that get there. "
        "Seconds: forward, backward and optimizer. Milliseconds: the median of windows of ten "
        "steps, each with one refresh.",
    ]
    for task in tasks:
        made = rows(task, methods, seeds, found)
        base = baseline(made)
        lines += ["", f"### {task.title}", "", _setting(task)]
        if base:
            goal = spread([run.lowest for run in base.runs], 3)
            lines += ["", f"AdamW's loss: {goal}, of “{base.method.name}”."]
        lines += ["", *table(task, made), "", f"![{task.name}]({task.name}.png)"]
        lines += ["", f"The search, seed {search.SEARCH_SEED}, lowest loss by learning rate:"]
        lines += ["", *search_table(task, methods, found)]
    return "\n".join(lines) + "\n"


def _setting(task: Task) -> str:
    what = f"windows of {task.context}" if task.name == "gpt" else "images"
    return (
        f"{task.steps} steps of {task.batch_size} {what}, width {task.width}, warm-up "
        f"{task.warmup} steps, then a cosine to 10 %, weight decay {task.weight_decay:g}; "
        f"validation on {task.validation} {what} every {task.evaluate_every} steps."
    )
