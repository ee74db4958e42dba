"""Does it train better? AdamW, Muon, SOAP, DASH and Shampoo on two small tasks with real data.

python bench/training.py --jobs 2

Tunes the learning rate of every method by the same search, then trains from every seed, and writes
one page of tables (training.md) and a picture a task. The text and the images are read from the
folder in SHAMPOO_KERNELS_DATA. Every run is kept in a file: the same command goes on where it was
stopped. About an hour with two jobs; needs what `make bench` installs.
"""

import argparse
import importlib.util
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

import machine
import torch
from comparison import methods, plots, results, runs, tasks
from comparison.plan import Plan, complete
from comparison.search import Found

import shampoo_kernels
from shampoo_kernels.commands._data import DataError

OUTPUT = Path(__file__).parent / "results" / "local" / "training"


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 and a line on stderr where an option or data is no good; 130: stopped."""
    try:
        plan = plan_of(parse(arguments))
    except (ValueError, DataError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 1
    os.environ["OMP_NUM_THREADS"] = str(plan.threads)  # of the workers, before they import torch
    context = multiprocessing.get_context("spawn")
    ignored = signal.SIGINT, signal.SIG_IGN  # Ctrl-C is for this process, which ends the workers
    pool = ProcessPoolExecutor(plan.jobs, context, signal.signal, ignored)
    try:
        found = complete(plan, pool, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():
            worker.terminate()
        print("\ntraining: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    print(f"\n{write(plan, found)}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = [task.name for task in tasks.TASKS]
    add("--tasks", nargs="+", choices=names, help="default: all whose data is there")
    every = "; ".join(method.name for method in methods.METHODS)
    add("--methods", nargs="+", metavar="NAME", help=f"default: all of {every}")
    add("--seeds", type=int, help="default: 3")
    add("--threads", type=int, default=1, help="of torch, for each run (default: 1)")
    add("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    add("--output", type=Path, default=OUTPUT, help="the folder (default: %(default)s)")
    add("--quick", action="store_true", help="few steps of two methods, to see that it works")
    return parser.parse_args(arguments)


def plan_of(args: argparse.Namespace) -> Plan:
    """Raises ValueError for an option, DataError where no task, or not one asked for, has data."""
    seeds = args.seeds if args.seeds is not None else 1 if args.quick else 3
    for option, value in (("seeds", seeds), ("threads", args.threads), ("jobs", args.jobs)):
        if not 1 <= value <= 1024:
            raise ValueError(f"--{option} must be from 1 to 1024, got {value}")
    names = args.methods or (methods.QUICK if args.quick else [m.name for m in methods.METHODS])
    entries = methods.named(names)
    peers = [method.name for method in entries if method.make is methods.peer]
    if peers and not importlib.util.find_spec("pytorch_optimizer"):
        raise ValueError(f"{', '.join(peers)}: needs pytorch_optimizer, which is not installed")
    chosen = []
    for task in tasks.quick() if args.quick else tasks.TASKS:
        if args.tasks is not None and task.name not in args.tasks:
            continue
        try:
            tasks.check_data(task)
            chosen.append(task)
        except DataError as error:
            if args.tasks is not None:
                raise
            print(f"training: {task.name} is left out: {error}", file=sys.stderr)
    if not chosen:
        raise DataError("there is no data for any task")
    return Plan(chosen, entries, seeds, args.output, args.threads, args.jobs)


def write(plan: Plan, found: Found) -> str:
    """The tables, which are returned too, and the pictures."""
    for task in plan.tasks:
        made = results.rows(task, plan.methods, plan.seeds, found)
        runs.write(plan.folder / f"{task.name}.png", plots.draw(task, made))
    text = results.markdown(plan.tasks, plan.methods, plan.seeds, found, _machine(plan))
    runs.write(plan.folder / "training.md", text)
    return text


def _machine(plan: Plan) -> str:
    parts = [
        machine.cpu_name(),
        f"{plan.jobs} run{'s' * (plan.jobs > 1)} at a time of {plan.threads} "
        f"thread{'s' * (plan.threads > 1)}",
        f"torch {torch.__version__}",
        f"shampoo_kernels {shampoo_kernels.__version__}",
    ]
    if any(method.make is methods.peer for method in plan.methods):
        parts.append(f"pytorch_optimizer {metadata.version('pytorch_optimizer')}")
    return f"{', '.join(parts)}."


if __name__ == "__main__":
    sys.exit(main())
