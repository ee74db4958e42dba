"""How everything is timed: functions take turns, round by round, so that noise meets all of them.

Medians with quartiles, after a warm-up; the same code under `make bench` and under
`python -m shampoo_kernels bench`.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

Function = Callable[[], object]


class Times(NamedTuple):
    """Seconds of one call: the median, the quartiles, and of how many rounds."""

    median: float
    q1: float
    q3: float
    rounds: int


def summary(seconds: Iterable[float]) -> Times:
    """Median and quartiles (linear between order statistics) of at least one measurement."""
    own = sorted(seconds)
    if len(own) == 1:
        return Times(own[0], own[0], own[0], 1)
    q1, median, q3 = statistics.quantiles(own, n=4, method="inclusive")
    return Times(median, q1, q3, len(own))


def timed(function: Function, wait: Function = lambda: None) -> float:
    """Seconds of one call; `wait` returns once a device has finished."""
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def rounds_for(once: float, budget: float, fewest: int, most: int) -> int:
    """How many rounds of `once` seconds fit into the budget, within the limits."""
    return int(min(max(budget / max(once, 1e-9), fewest), most))


def in_turn(
    functions: Mapping[str, Function],
    budget: float,
    *,
    fewest: int = 3,
    most: int = 200,
    wait: Function = lambda: None,
) -> dict[str, Times]:
    """Time all functions for about `budget` seconds together, every other round backwards."""
    for function in functions.values():
        function()
    once = sum(timed(function, wait) for function in functions.values())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for _ in range(rounds_for(once, budget, fewest, most)):
        for name in order:
            seconds[name].append(timed(functions[name], wait))
        order.reverse()
    return {name: summary(times) for name, times in seconds.items()}
