"""Training runs that are killed by SIGKILL, and go on in a new process from what they had saved.

A run trains many optimizers side by side, one of each variant, and after every step replaces the
checkpoint of all of them in one atomic rename, as a careful trainer does.
"""

import contextlib
import datetime
import math
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import gradients, parameters

from shampoo_kernels import Shampoo

SHAPES = [(7, 5), (7, 5), (5,), (3, 2, 2, 2), (), (8, 5)]
OPTIONS = {"block_size": 4, "refresh_every": 3, "lr": 0.01}


@dataclass(frozen=True)
class Death:
    """Where a process kills itself: in `step`, before its `at`-th operation of torch, at the latest
    when it is made; or while it saves that step, after `at` bytes; or before the file is renamed.
    """

    step: int
    where: str  # "step", "save" or "rename"
    at: int = 0


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Counting(TorchDispatchMode):
    """Kills the process at an operation, before that is carried out."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.left == 0:
            kill()
        self.left -= 1
        return function(*args, **(kwargs or {}))


class DyingFile:
    """A file whose writer is killed after so many bytes."""

    def __init__(self, file, at):
        self.file, self.left = file, at

    def write(self, data):
        data = memoryview(data).cast("B")
        self.file.write(data[: self.left])
        self.left -= len(data)
        if self.left < 0:
            self.file.flush()
            kill()
        return len(data)

    def flush(self):
        self.file.flush()


def local(tensor):
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


class Run:
    """Optimizers of `variants`, {name: options}, and their checkpoints in `folder`, two of them."""

    def __init__(self, variants, folder, *, shapes=SHAPES, wrap=lambda x: x, **options):
        self.folder, self.shapes, self.wrap = Path(folder), shapes, wrap
        self.all = {}
        for name, own in variants.items():
            weights = [nn.Parameter(wrap(p.detach())) for p in parameters(*shapes)]
            self.all[name] = weights, Shampoo(weights, **{**OPTIONS, **own, **options})

    def saved(self):
        """The steps of which there are checkpoints."""
        return sorted(int(path.stem) for path in self.folder.glob("*.pt"))

    def load(self, step, **options):
        content = torch.load(self.folder / f"{step}.pt", **options)
        for name, (weights, optimizer) in self.all.items():
            for weight, value in zip(weights, content[name]["weights"], strict=True):
                local(weight).copy_(local(value))
            optimizer.load_state_dict(content[name]["optimizer"])

    def save(self, step, death=None):
        content = {
            name: {"weights": [w.data for w in weights], "optimizer": optimizer.state_dict()}
            for name, (weights, optimizer) in self.all.items()
        }
        new = self.folder / "new"
        with new.open("wb") as file:
            dying = death is not None and (death.where, death.step) == ("save", step)
            torch.save(content, DyingFile(file, death.at) if dying else file)
        if death is not None and (death.where, death.step) == ("rename", step):
            kill()
        new.replace(self.folder / f"{step}.pt")
        for old in self.saved()[:-2]:
            (self.folder / f"{old}.pt").unlink()

    def step(self, step):
        """Gradients depend on the step and on the weights; in step 2 one block has a bad one."""
        for weights, optimizer in self.all.values():
            for index, weight in enumerate(weights):
                noise = gradients(self.shapes[index], 1, torch.float32, seed=100 * step + index)[0]
                if (step, index) == (2, 0):
                    noise[6, 4] = math.nan  # counts of a block and of its parameter part here
                weight.grad = weight.detach() + self.wrap(noise)
            optimizer.step()

    def go_on(self, first, last, death=None):
        """Make steps first + 1 .. last, each saved as what was made by then."""
        for step in range(first + 1, last + 1):
            dying = death is not None and (death.where, death.step) == ("step", step)
            with Counting(death.at) if dying else contextlib.nullcontext():
                self.step(step)
            if dying:
                kill()
            self.save(step, death)


def alone(folder, variants, last, death):
    torch.set_num_threads(1)
    run = Run(variants, folder)
    first = max(run.saved(), default=0)
    if first:
        run.load(first, weights_only=True)
    run.go_on(first, last, death)


def one_of_many(rank, world, folder, attempt, kind, variants, last, death):
    """The blocks are shared out; every rank has checkpoints of its own, which may be a step apart.

    The newest step that all have counts.
    """
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{attempt}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=150),
    )  # fmt: skip
    own = Path(folder) / str(rank)
    own.mkdir(exist_ok=True)
    if kind == "replicas":
        run = Run(variants, own, process_group=dist.group.WORLD)
    else:
        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        shapes = [shape for shape in SHAPES if shape]  # fully_shard takes no scalars either
        run = Run(
            variants, own, shapes=shapes, wrap=lambda x: distribute_tensor(x, mesh, [Shard(0)])
        )
    first = torch.tensor(max(run.saved(), default=0))
    dist.all_reduce(first, dist.ReduceOp.MIN)
    if first:
        run.load(int(first), weights_only=kind == "replicas")
    run.go_on(int(first), last, death if rank == world - 1 else None)
    dist.barrier()
    dist.destroy_process_group()


def start(function, *arguments):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "shampoo_kernels"])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def end(process, expected, seconds=300):
    """Wait for a process that must end as `expected`: 0, or -SIGKILL."""
    process.join(seconds)
    found = process.exitcode
    if found is None:
        process.kill()
        process.join()
    assert found == expected, f"a process ended with {found}, not with {expected}"


def killed_outside(folder, step, wait, function, *arguments):
    """SIGKILL `wait` seconds after there is a checkpoint of `step`, wherever the run is then."""
    process, deadline = start(function, *arguments), time.monotonic() + 300
    while not (Path(folder) / f"{step}.pt").exists() and process.is_alive():
        assert time.monotonic() < deadline, f"no step {step} in time"
        time.sleep(0.001)
    time.sleep(wait)
    process.kill()
    end(process, -signal.SIGKILL)
