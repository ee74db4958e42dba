"""What the paper claims, each with a rule fixed beforehand and the numbers that it is applied to.

The output layer of a classifier of two classes is no case for claims about closeness: its H is a
Kronecker product by construction.
"""

from collections.abc import Callable, Iterable
from typing import Any

from shampoo_kernels.commands.study.runs import VIEWS
from shampoo_kernels.commands.study.verdicts import Case, Claim

Row = dict[str, Any]
CLOSE = 0.95
LITTLE = 0.02
SAME = 1e-3


def grouped(rows: Iterable[tuple[str, Row]], keys: tuple[str, ...]) -> dict[tuple, list[Row]]:
    """Rows of all runs of a setting, together where setting and keys agree: one row per seed."""
    groups: dict[tuple, list[Row]] = {}
    for setting, row in rows:
        groups.setdefault((setting, *(row[key] for key in keys)), []).append(row)
    return groups


def claims(runs: list[Row]) -> list[Claim]:
    """All claims, from the stored runs."""
    rows = [(run["setting"], row) for run in runs for row in run["rows"]]
    points = grouped(rows, ("view", "layer", "step"))
    tricks = grouped(
        [(run["setting"], row) for run in runs for row in run["tricks"]],
        ("layer", "step", "labels", "batch_size"),
    )
    return [_one_step(runs), *_along(points), *_tricks(tricks), *_beyond(points)]


def _one_step(runs: list[Row]) -> Claim:
    groups: dict[str, list[float]] = {}
    for run in runs:
        for layer, difference in run["one_step"].items():
            groups.setdefault(f"{run['setting']}, layer {layer}", []).append(difference)
    return Claim(
        "The square of Shampoo's approximation is one step of the power iteration, from the "
        "identity, towards the optimal Kronecker product.",
        "relative difference between one power step and E[GGᵀ], E[GᵀG] at most 1e-10",
        ".1e",
        [Case(where, values, 1e-10, False) for where, values in groups.items()],
    )


def _along(points: dict[tuple, list[Row]]) -> list[Claim]:
    found = []
    for view, name in VIEWS.items():
        found.append(
            Claim(
                f"That square, Shampoo², is close to the optimal Kronecker product ({name} view).",
                f"cosine of Shampoo² at least {CLOSE:.0%} of the optimal cosine",
                ".3f",
                _cases(points, lambda row, v=view: row["view"] == v,  # type: ignore[misc]
                       lambda row: row["cosine_shampoo_squared"] / row["cosine_optimal"],
                       CLOSE, True),
            )
        )  # fmt: skip
    for view, name in VIEWS.items():
        found.append(
            Claim(
                f"Shampoo itself, L^1/2 ⊗ R^1/2, is further away than Shampoo² ({name} view).",
                f"cosine of Shampoo² minus that of Shampoo at least {SAME}",
                "+.3f",
                _cases(points, lambda row, v=view: row["view"] == v,  # type: ignore[misc]
                       lambda row: row["cosine_shampoo_squared"] - row["cosine_shampoo"],
                       SAME, True),
                from_the_abstract=False,
            )
        )  # fmt: skip
    return found


def _cases(
    points: dict[tuple, list[Row]],
    wanted: Callable[[Row], bool],
    number: Callable[[Row], float],
    threshold: float,
    at_least: bool,
) -> list[Case]:
    return [
        Case(
            f"{setting}, layer {layer}, step {step}, {VIEWS[view]}",
            [number(row) for row in rows],
            threshold,
            at_least,
        )
        for (setting, view, layer, step), rows in points.items()
        if wanted(rows[0]) and rows[0]["m"] > 2
    ]


def _tricks(tricks: dict[tuple, list[Row]]) -> list[Claim]:
    """Batch gradients and the empirical Fisher. Ratios of two groups of rows, seed by seed."""
    sizes = sorted({size for *_, size in tricks})
    places = list(dict.fromkeys((setting, layer, step) for setting, layer, step, *_ in tricks))

    def ratios(
        above: Callable[[list[int]], tuple[str, int, str]],
        below: Callable[[list[int]], tuple[str, int, str]],
        threshold: float,
        at_least: bool,
    ) -> list[Case]:
        cases = []
        for place in places:
            mine = [size for size in sizes if (*place, "real", size) in tricks]
            values = []
            for kind, size, number in (above(mine), below(mine)):
                values.append([row[number] for row in tricks[(*place, kind, size)]])
            shares = [a / b for a, b in zip(*values, strict=True)]
            where = "{}, layer {}, step {}".format(*place)
            cases.append(Case(where, shares, threshold, at_least))
        return cases

    return [
        Claim(
            "With labels sampled from the model, gradients of whole batches are as good as "
            "gradients of single examples (Gauss–Newton view).",
            "cosine of Shampoo² made of as many gradients of the largest batch size, at least "
            f"{CLOSE:.0%} of that with batch size 1",
            ".3f",
            ratios(lambda s: ("sampled", s[-1], "shampoo_squared"),
                   lambda s: ("sampled", s[0], "shampoo_squared"), CLOSE, True),
        ),
        Claim(
            "Real labels in place of sampled ones (the empirical Fisher) are close at batch size "
            "1.",
            "cosine of Shampoo² with real labels, exact expectation, at least "
            f"{CLOSE:.0%} of that with labels of the model",
            ".3f",
            ratios(lambda s: ("real", s[0], "expectation"),
                   lambda s: ("sampled", s[0], "expectation"), CLOSE, True),
        ),
        Claim(
            "Both at once, real labels and large batches, is worse than real labels alone.",
            "cosine of Shampoo² with the largest batch size, exact expectation, at most "
            f"{CLOSE:.0%} of that with batch size 1",
            ".3f",
            ratios(lambda s: ("real", s[-1], "expectation"),
                   lambda s: ("real", s[0], "expectation"), CLOSE, False),
        ),
    ]  # fmt: skip


def _beyond(points: dict[tuple, list[Row]]) -> list[Claim]:
    return [
        Claim(
            "K-FAC is no closer than Shampoo² (Gauss–Newton view).",
            f"cosine of Shampoo² minus that of K-FAC at least -{SAME}",
            "+.3f",
            _cases(points, lambda row: "cosine_kfac" in row,
                   lambda row: row["cosine_shampoo_squared"] - row["cosine_kfac"], -SAME, True),
            from_the_abstract=False,
        ),
        Claim(
            "More than one power step adds little.",
            f"cosine after three steps minus that after one at most {LITTLE}",
            "+.4f",
            _cases(points, lambda row: "cosine_three_steps" in row,
                   lambda row: row["cosine_three_steps"] - row["cosine_shampoo_squared"],
                   LITTLE, False),
            from_the_abstract=False,
        ),
        Claim(
            "The cosine of Shampoo² is at least what the two largest singular values of the "
            "rearranged H, and the traces of its leading factors, promise.",
            "measured cosine minus the lower bound at least 0 (to rounding, 1e-6)",
            "+.3f",
            _cases(points, lambda row: "bound" in row,
                   lambda row: row["cosine_shampoo_squared"] - row["bound"], -1e-6, True),
            from_the_abstract=False,
        ),
    ]  # fmt: skip
