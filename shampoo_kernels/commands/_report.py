"""What the demo says: tables and summary, from the numbers of its runs alone."""

import math
import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from shampoo_kernels.commands._results import (
    APPROXIMATIONS,
    BASELINE,
    CANDIDATE,
    Result,
    best,
    comparison,
    final_cosines,
)


def tuning_table(result: Result) -> str:
    rates = list(next(iter(result.tuning.values())))
    lines = [f"{'learning rate':<15}" + "".join(f"{lr:>10g}" for lr in rates)]
    for name, losses in result.tuning.items():
        cells = "".join(
            f"{losses[lr]:>9.4f}" + ("*" if lr == best(losses) else " ") for lr in rates
        )
        lines.append(f"{name:<15}{cells}")
    for name, losses in result.tuning.items():
        if best(losses) in (rates[0], rates[-1]):
            lines.append(
                f"{name}: the best learning rate is at the edge of the grid; "
                "a better one may lie beyond"
            )
    return "\n".join(lines)


def comparison_table(result: Result) -> str:
    lines = [f"{'':<28}{BASELINE:<20}{CANDIDATE:<20}better"]
    rates = {name: f"{best(losses):g}" for name, losses in result.tuning.items()}
    lines.append(f"{'learning rate':<28}{rates[BASELINE]:<20}{rates[CANDIDATE]:<20}")
    lines += [
        f"{row.name:<28}{row.cell(BASELINE):<20}{row.cell(CANDIDATE):<20}{row.verdict()}"
        for row in comparison(result)
    ]
    return "\n".join(line.rstrip() for line in lines)


def cosine_table(result: Result) -> str:
    lines = [
        f"{'layer':<10}{'gradient':<12}" + "".join(f"{a:>10}" for a in APPROXIMATIONS.values())
    ]
    for layer, found in final_cosines(result).items():
        m, n = result.shapes[layer]
        lines.append(f"{layer:<10}{f'{m} x {n}':<12}" + "".join(f"{c:>10.4f}" for c in found))
    return "\n".join(lines)


def text(result: Result) -> str:
    """All that is printed: what was run, three tables, the summary."""
    settings = result.settings
    seeds = seeds_text(trace.seed for trace in result.traces)
    every = settings["evaluated_every"]
    every = "step" if every == 1 else f"{every:.3g} steps"
    return f"""\
AdamW and Shampoo on {settings["data"]}: {settings["training_images"]} images to train on, \
{settings["validation_images"]} to validate;
{steps_text(settings["steps"])} of {settings["batch_size"]} images; threads: {settings["threads"]}

Tuning: final validation loss, mean over {seeds_text(settings["tuning_seeds"])} (* the lowest)
{tuning_table(result)}

Comparison: mean ± standard deviation over {seeds}
{comparison_table(result)}
"to {BASELINE}'s loss": the first evaluation at or below {BASELINE}'s final validation loss of the \
same seed,
median over the seeds; one every {every}; seconds: of forward, \
backward and optimizer alone

Cosine with E[ggᵀ] after Shampoo's last step, median over the seeds. E: the mean over \
{settings["examples"]} training
examples; g: one example's gradient with its true label (the empirical Fisher, that is, the
paper's Hessian view with real labels, one example a batch)
{cosine_table(result)}

{summary(result)}"""


def seeds_text(seeds: Iterable[int]) -> str:
    """ "seed 2" or "seeds 2, 3"."""
    names = list(map(str, seeds))
    return f"seed{'s' * (len(names) > 1)} {', '.join(names)}"


def steps_text(count: float) -> str:
    """ "1 step" or "2 steps"."""
    return "1 step" if count == 1 else f"{count:.0f} steps"


def numbers(result: Result) -> Any:
    """The result with what the tables make of it; numbers that are not finite become None."""
    found = asdict(result) | {
        "learning_rates": {name: best(losses) for name, losses in result.tuning.items()},
        "comparison": {
            row.name: row.values
            | {"shown": {name: row.cell(name) for name in row.values}, "better": row.better()}
            for row in comparison(result)
        },
        "cosines": {name: c._asdict() for name, c in final_cosines(result).items()},
        "summary": summary(result),
    }
    for trace, written in zip(result.traces, found["traces"], strict=True):
        written["layers"] = {k: [c._asdict() for c in v] for k, v in trace.layers.items()}
    return _plain(found)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def summary(result: Result) -> str:
    """Three paragraphs, whatever the numbers say."""
    parts = _speed(result), _standing(result), _kronecker(result)
    return "\n".join(textwrap.fill(part, 100) for part in parts)


def _speed(result: Result) -> str:
    steps, seconds, *_ = comparison(result)
    goal = f"{BASELINE}'s final validation loss"
    if math.isinf(steps.typical(CANDIDATE)):
        return f"{CANDIDATE} does not reach {goal} in {steps_text(result.settings['steps'])}."
    ours, theirs = (
        f"{steps_text(steps.typical(name))} or {seconds.typical(name):.2f} s"
        for name in (CANDIDATE, BASELINE)
    )
    return (
        f"{CANDIDATE} first reaches {goal} after {ours}, {BASELINE} itself after {theirs} "
        "(medians over the seeds)."
    )


def _standing(result: Result) -> str:
    rows = comparison(result)
    groups = {
        f"{CANDIDATE} is better in every seed": [r.name for r in rows if r.better() == CANDIDATE],
        f"{BASELINE} is better in every seed": [r.name for r in rows if r.better() == BASELINE],
        "The seeds do not agree or are equal": [r.name for r in rows if not r.better()],
    }
    return " ".join(f"{who}: {', '.join(names) or 'nothing'}." for who, names in groups.items())


def _kronecker(result: Result) -> str:
    found = [c for c in final_cosines(result).values() if not math.isnan(c.optimal)]
    if not found:
        return "No layer had a gradient whose cosines could be measured."

    def share(name: str) -> str:
        shares = [100 * getattr(c, name) / c.optimal for c in found]
        return f"{min(shares):.1f} to {max(shares):.1f} %"

    above = sum(c.shampoo_squared > c.shampoo for c in found)
    return (
        "The paper says that Shampoo² comes close to the optimal Kronecker product and that "
        "Shampoo stays further away; measured here at the end of training, Shampoo² has "
        f"{share('shampoo_squared')} of the optimal cosine, Shampoo {share('shampoo')}, and "
        f"Shampoo² is the closer one in {above} of {len(found)} layers."
    )
