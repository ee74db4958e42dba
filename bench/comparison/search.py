"""Which runs are still wanted: the search for the learning rate, then the other seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from comparison.methods import Method
from comparison.runs import Key, Run
from comparison.tasks import Task

SEARCH_SEED = 0
RATIO = 2.0
MOST_EXTENSIONS = 5
RULE = (
    f"Learning rates: seed {SEARCH_SEED}, full runs, a grid of ratio {RATIO:g} that is extended "
    f"while its best is at an edge (at most {MOST_EXTENSIONS} times), then the two neighbours of "
    f"the best at ratio √{RATIO:g}; the lowest validation loss decides. The other seeds run at "
    f"that rate; seed {SEARCH_SEED} is reported with them."
)
Found = Mapping[Key, Run]


def rounded(lr: float) -> float:
    """To three digits, so that a rate is the same number whichever way it was reached."""
    return float(f"{lr:.3g}")


class Search(NamedTuple):
    """Where a search is: over when nothing is missing."""

    missing: list[float]  # rates still to try
    rates: list[float]  # all of the search so far, ascending, the missing included
    refining: bool  # the grid is done


def search(start: Sequence[float], losses: Mapping[float, float]) -> Search:
    """The search that starts with the rates `start`, as far as `losses` lets it come.

    `losses` holds the lowest validation loss of each rate tried, inf where the run failed; rates
    that the search does not come by are ignored. Where losses are equal the lower rate is better,
    so if all fail it goes down.
    """
    grid = sorted(start)
    for extensions in range(MOST_EXTENSIONS + 1):
        missing = [lr for lr in grid if lr not in losses]
        if missing:
            return Search(missing, grid, refining=False)
        best = min(grid, key=losses.__getitem__)
        if best not in (grid[0], grid[-1]) or extensions == MOST_EXTENSIONS:
            break
        if best == grid[0]:
            grid.insert(0, rounded(best / RATIO))
        else:
            grid.append(rounded(best * RATIO))
    between = [rounded(best / math.sqrt(RATIO)), rounded(best * math.sqrt(RATIO))]
    missing = [lr for lr in between if lr not in losses]
    return Search(missing, sorted({*grid, *between}), refining=True)


def losses_of(task: Task, method: Method, found: Found) -> dict[float, float]:
    """Of each learning rate, by the seed of the search."""
    return {
        key.lr: run.lowest
        for key, run in found.items()
        if (key.task, key.method.name, key.seed) == (task, method.name, SEARCH_SEED)
    }


def chosen(task: Task, method: Method, found: Found) -> tuple[float, bool] | None:
    """The best learning rate, and whether it is the lowest or highest tried; None: search on."""
    losses = losses_of(task, method, found)
    state = search(method.rates, losses)
    if state.missing:
        return None
    best = min(state.rates, key=losses.__getitem__)
    return best, best in (state.rates[0], state.rates[-1])


def wanted(task: Task, method: Method, seeds: int, found: Found) -> list[Key]:
    """The runs that can start now; none: all is done."""
    best = chosen(task, method, found)
    if best is None:
        missing = search(method.rates, losses_of(task, method, found)).missing
        keys = [Key(task, method, lr, SEARCH_SEED) for lr in missing]
    else:
        keys = [Key(task, method, best[0], seed) for seed in range(seeds)]
    return [key for key in keys if key not in found]


def expected(task: Task, method: Method, seeds: int, found: Found) -> int:
    """How many runs are left if the search is not extended further."""
    count = len(wanted(task, method, seeds, found))
    if chosen(task, method, found) is not None:
        return count
    refining = search(method.rates, losses_of(task, method, found)).refining
    return count + (seeds - 1) + (0 if refining else 2)
