"""How everything here is timed: each row alternates ours with its baselines, round by round, so
that noise of the machine meets all of them; medians and quartiles; the error against float64 in the
same row. What fails is kept in the row and said to fail.

pytest-benchmark runs and stores the rows; the page at the end is what `report.py` makes of them.
"""

import os
from collections.abc import Callable

import machine
import pytest
import rivals
import torch
from judging import ACCEPTED, judged, words

from shampoo_kernels.commands._timing import rounds_for, summary, timed

QUICK = os.environ.get("QUICK") == "1"
SECONDS_A_ROW = 0.05 if QUICK else 0.8
FEWEST_ROUNDS, MOST_ROUNDS = 3, 20 if QUICK else 200
LONG = 2.0  # seconds of a round from which two are enough: their spread has been 3 % at most
TABLES = pytest.StashKey[dict[str, list[dict]]]()


@pytest.fixture
def versus(benchmark):
    """versus(ours, {"name": baseline, ...}, case=..., errors={"ours": ..., "name": ...}, ...).

    Every function takes no argument. `flops` and `moved` count the useful operations and the bytes
    that one call of ours cannot avoid, `rate` is the dtype of its products. `errors` are relative
    to float64, or the words of what was raised; above `accepted` they are failures. `sizes` is what
    the plots need. `budget`: seconds for the row, `fewest`: rounds, of long ones two.
    """

    def run(
        ours: Callable[[], object],
        baselines: dict[str, Callable[[], object]],
        *,
        case: str,
        flops: float | None = None,
        moved: float | None = None,
        rate: str = "float32",
        errors: dict[str, object] | None = None,
        accepted: float = ACCEPTED,
        sizes: dict[str, float] | None = None,
        budget: float = SECONDS_A_ROW,
        fewest: int = FEWEST_ROUNDS,
    ) -> None:
        found, failed = judged(errors or {}, accepted)
        once, able = timed(ours), {}
        for name, function in baselines.items():
            if isinstance((errors or {}).get(name), str):
                continue  # it raised before
            try:
                once += timed(function)
                able[name] = function
            except Exception as error:
                failed[name] = words(error)
        if once < budget:  # that was the warm-up; a long call is not repeated for its estimate
            once = timed(ours) + sum(map(timed, able.values()))
        seconds: dict[str, list[float]] = {name: [] for name in able}
        order = list(able)

        def baselines_first():
            order.reverse()
            for name in order:
                seconds[name].append(timed(able[name]))

        least = fewest if once < LONG else min(fewest, 2)
        rounds = rounds_for(once, budget, least, MOST_ROUNDS)
        benchmark.pedantic(ours, setup=baselines_first, rounds=rounds)
        benchmark.extra_info.update(
            case=case,
            flops=flops,
            moved=moved,
            rate=rate,
            errors=found,
            failed=failed,
            sizes=sizes or {},
            baselines={name: summary(times)._asdict() for name, times in seconds.items()},
        )

    return run


@pytest.fixture
def note(request):
    """note("table", column=cell, ...): a line of a table of what was counted, not timed."""
    tables = request.config.stash.setdefault(TABLES, {})

    def add(table: str, **cells: object) -> None:
        tables.setdefault(table, []).append(cells)

    return add


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()  # what the table is read against, and no host names
    machine_info["shampoo_kernels"] = machine.facts(QUICK)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
    output_json["tables"] = config.stash.get(TABLES, {})
    output_json["left_out"] = rivals.left_out()


def pytest_terminal_summary(terminalreporter):
    for line in rivals.left_out():
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
