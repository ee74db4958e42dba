"""How everything here is timed: each row alternates ours with its baselines, round by round, so
that noise of the machine meets all of them; medians; the error against float64 in the same row.

pytest-benchmark runs and stores the rows; the table at the end is what `report.py` makes of them.
"""

import os
import time
from collections.abc import Callable
from statistics import median

import pytest
import report
import torch

QUICK = os.environ.get("QUICK") == "1"
SECONDS_A_ROW = 0.25 if QUICK else 2.0
FEWEST_ROUNDS, MOST_ROUNDS = 3, 20 if QUICK else 200


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.fixture
def versus(benchmark):
    """versus(ours, {"name": baseline, ...}, case=..., flops=..., errors={"ours": ..., ...}).

    Every function takes no argument. `flops` counts the useful operations of one call, `errors` are
    relative to float64 and come from the caller.
    """

    def run(
        ours: Callable[[], object],
        baselines: dict[str, Callable[[], object]],
        *,
        case: str,
        flops: float | None = None,
        errors: dict[str, float] | None = None,
    ) -> None:
        for function in (ours, *baselines.values()):
            function()
        once = timed(ours) + sum(timed(f) for f in baselines.values())
        rounds = int(min(max(SECONDS_A_ROW / once, FEWEST_ROUNDS), MOST_ROUNDS))
        seconds: dict[str, list[float]] = {name: [] for name in baselines}

        def baselines_first():
            for name, function in baselines.items():
                seconds[name].append(timed(function))

        benchmark.pedantic(ours, setup=baselines_first, rounds=rounds, warmup_rounds=1)
        benchmark.extra_info.update(
            case=case,
            flops=flops,
            errors={name: float(e) for name, e in (errors or {}).items()},
            baselines={name: median(times[1:]) for name, times in seconds.items()},
        )

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()  # what the table is read against, and no host names
    machine_info["shampoo_kernels"] = report.machine()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
