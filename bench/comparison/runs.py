"""One run: a task trained by a method from a seed at a learning rate, kept as one JSON file."""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from comparison import methods
from comparison.methods import Method
from comparison.tasks import Task, Training
from shampoo_kernels.commands.study.runs import write

FORMAT = 1  # of the stored runs: to be raised when the code of models, data or clock changes
FINAL_SHARE = 0.1  # of the learning rate, at the end of the cosine


class Key(NamedTuple):
    """Names a run."""

    task: Task
    method: Method
    lr: float
    seed: int


@dataclass
class Run:
    """Validation along training. `seconds` counts forward, backward and optimizer, nothing else.

    `failed` tells why the run ended early, "" if it did not. `ms_per_step` is the median over
    windows of ten steps, each of which holds one refresh of every root, divided by ten.
    """

    steps: list[int]
    seconds: list[float]
    loss: list[float]
    accuracy: list[float] | None
    ms_per_step: float
    wall_seconds: float
    failed: str

    @property
    def lowest(self) -> float:
        """The lowest validation loss; inf for a run that failed."""
        return math.inf if self.failed else min(self.loss)


def schedule(step: int, task: Task) -> float:
    """The learning rate of step 0, 1, ... as a share of the peak: linear, then a cosine."""
    if step < task.warmup:
        return (step + 1) / task.warmup
    along = (step - task.warmup) / max(1, task.steps - task.warmup)
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * along))


def train(key: Key, threads: int) -> Run:
    """Train and validate; stops at the first validation loss that is not finite."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    task = key.task
    training = Training(task, key.seed)
    torch.manual_seed(key.seed)  # for methods that draw, DASH's power iteration say
    own = key.method.optimizers(training.hidden, training.others, key.lr, task.weight_decay)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in own]
    run = Run([], [], [], [], math.nan, 0.0, "")
    times: list[float] = []
    _evaluate(run, training, 0, 0.0)
    for step in range(task.steps):
        for optimizer, rates in zip(own, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * schedule(step, task)
        loss_of = training.next_batch()
        start = time.perf_counter()
        try:
            for optimizer in own:
                optimizer.zero_grad()
            loss_of().backward()
            for optimizer in own:
                optimizer.step()
        except torch.linalg.LinAlgError as error:
            run.failed = f"{type(error).__name__} at step {step + 1}"
            break
        times.append(time.perf_counter() - start)
        if (step + 1) % task.evaluate_every == 0 or step + 1 == task.steps:
            _evaluate(run, training, step + 1, sum(times))
            if run.failed:
                break
    run.accuracy = run.accuracy or None
    windows = [sum(times[i : i + 10]) / 10 for i in range(0, len(times) - 9, 10)]
    run.ms_per_step = 1e3 * median(windows or times or [math.nan])
    run.wall_seconds = time.perf_counter() - began
    return run


def _evaluate(run: Run, training: Training, step: int, seconds: float) -> None:
    loss, accuracy = training.validate()
    if not math.isfinite(loss):
        run.failed = f"loss {loss} at step {step}"
        return
    run.steps.append(step)
    run.seconds.append(seconds)
    run.loss.append(loss)
    if accuracy is not None:
        assert run.accuracy is not None
        run.accuracy.append(accuracy)


def fingerprint(key: Key, threads: int) -> str:
    """Of all that a stored run depends on, kernels and packages left out."""
    task = {name: value for name, value in asdict(key.task).items() if name != "about_seconds"}
    method = [key.method.name, key.method.split, sorted(key.method.options.items())]
    common = [FORMAT, FINAL_SHARE, methods.OTHERS_LR, methods.BETAS, methods.REFRESH]
    parts = [common, task, method, key.lr, key.seed, threads, torch.__version__]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def path_of(folder: Path, key: Key) -> Path:
    method = re.sub(r"[^a-z0-9]+", "-", key.method.name.lower()).strip("-")
    return folder / "runs" / f"{key.task.name}_{method}_lr{key.lr:g}_seed{key.seed}.json"


def read(folder: Path, key: Key, threads: int) -> Run | None:
    """The stored run, or None where there is none, one of other settings, or a damaged one."""
    try:
        found = json.loads(path_of(folder, key).read_text(encoding="utf-8"))
        if found["fingerprint"] != fingerprint(key, threads):
            return None
        return Run(**{f.name: found[f.name] for f in fields(Run)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(folder: Path, key: Key, threads: int, run: Run) -> None:
    """Atomically: a run that is stopped meanwhile leaves the old file, or none."""
    named = {"task": key.task.name, "method": key.method.name, "lr": key.lr, "seed": key.seed}
    found: dict[str, Any] = named | {"fingerprint": fingerprint(key, threads)} | asdict(run)
    write(path_of(folder, key), json.dumps(found, indent=1))


def train_and_store(folder: Path, key: Key, threads: int, train: Callable = train) -> Run:
    """What a worker process does."""
    run = train(key, threads)
    store(folder, key, threads, run)
    return run
