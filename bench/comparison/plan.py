"""All that is wanted, run after run: read where it is stored, else made by a worker and stored."""

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path

from comparison import runs, search
from comparison.methods import Method
from comparison.runs import Key, Run
from comparison.search import Found
from comparison.tasks import Task


@dataclass(frozen=True)
class Plan:
    tasks: list[Task]
    methods: list[Method]
    seeds: int
    folder: Path
    threads: int = 1  # of each run
    jobs: int = 1  # runs at a time

    def wanted(self, found: Found) -> list[Key]:
        """The runs that can start now, task by task."""
        pairs = [(task, method) for task in self.tasks for method in self.methods]
        return [key for pair in pairs for key in search.wanted(*pair, self.seeds, found)]

    def estimate(self, found: Found) -> tuple[int, float]:
        """Runs left if no search is extended further, and the seconds they take together."""
        count, seconds = 0, 0.0
        for task in self.tasks:
            for method in self.methods:
                left = search.expected(task, method, self.seeds, found)
                count += left
                seconds += left * _seconds_a_run(task, method, found)
        return count, seconds / self.jobs


def _seconds_a_run(task: Task, method: Method, found: Found) -> float:
    """Of this method's runs, else of the task's, else what the task says."""
    took = [(key.method.name, run.wall_seconds) for key, run in found.items() if key.task == task]
    own = [seconds for name, seconds in took if name == method.name]
    known = own or [seconds for _, seconds in took]
    return sum(known) / len(known) if known else task.about_seconds


def complete(
    plan: Plan,
    pool: Executor,
    tell: Callable[[str], None],
    train: Callable[[Key, int], Run] = runs.train,
) -> dict[Key, Run]:
    """Every run of the plan; `tell` gets a line at the start and after every run."""
    found: dict[Key, Run] = {}
    under_way: dict[Future[Run], Key] = {}
    read_stored(plan, found)
    count, seconds = plan.estimate(found)
    tell(
        f"{len(found)} runs are there, about {count} to do: about {seconds / 60:.0f} minutes with "
        f"{plan.jobs} at a time, more where a search is extended"
    )
    began = time.perf_counter()
    while True:
        for key in plan.wanted(found):
            if key not in under_way.values():
                future = pool.submit(runs.train_and_store, plan.folder, key, plan.threads, train)
                under_way[future] = key
        if not under_way:
            return found
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            key = under_way.pop(future)
            found[key] = future.result()
            tell(_line(plan, key, found, time.perf_counter() - began))
        read_stored(plan, found)


def read_stored(plan: Plan, found: dict[Key, Run]) -> None:
    """Adds the stored runs that are wanted, those that these make wanted, and so on."""
    while True:
        stored = {key: runs.read(plan.folder, key, plan.threads) for key in plan.wanted(found)}
        new = {key: run for key, run in stored.items() if run is not None}
        if not new:
            return
        found |= new


def _line(plan: Plan, key: Key, found: Found, elapsed: float) -> str:
    run = found[key]
    outcome = run.failed or f"loss {run.lowest:.4f}, {run.ms_per_step:.1f} ms a step"
    count, seconds = plan.estimate(found)
    return (
        f"[{elapsed / 60:5.1f} min] {key.task.name}, {key.method.name}, lr {key.lr:g}, seed "
        f"{key.seed}: {outcome}, {run.wall_seconds:.0f} s; about {count} runs, "
        f"{seconds / 60:.0f} minutes left"
    )
