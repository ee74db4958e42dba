"""Ten steps of one model shared by several processes of this machine (gloo): what the busiest of
them computes, keeps and sends.

The processes take turns on the cores that there are, so that what each spends says more than how
long all of them take.
"""

import datetime
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

import counting
import sharding
import torch
import torch.distributed as dist
from cases import Shape
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_kernels import Shampoo

SECONDS = 120  # after which a run of processes has failed


class Share(NamedTuple):
    """Of one rank: a step, but for `kept`."""

    kept: int  # bytes of statistics and roots
    sent: int  # bytes
    collectives: float
    spent: float  # seconds of a core
    passed: float  # seconds


class Sent(TorchDispatchMode):
    """Counts what gather collectives send: a rank's own part, to every other."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.others, self.bytes, self.count = ranks - 1, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.count += 1
            self.bytes += self.others * _own_part(func, args).nbytes
        return func(*args, **(kwargs or {}))


def _own_part(func, args) -> torch.Tensor:
    if func._schema.name != "c10d::_allgather_base_":
        raise NotImplementedError(f"what {func} sends is not known here")
    return args[1]


def available() -> bool:
    return dist.is_available() and dist.is_gloo_available()


def shares(shapes: Sequence[Shape], ranks: int) -> list[Share]:
    """Run so many processes; RuntimeError where one fails or does not end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "shampoo_kernels"])
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            context.Process(target=_work, args=(rank, ranks, f"{folder}/store", shapes, pipe[1]))
            for rank, pipe in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        try:
            found = [_received(pipe[0]) for pipe in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()
    return found


def _received(reader: Connection) -> Share:
    found = reader.recv() if reader.poll(SECONDS) else "it did not end in time"
    if not isinstance(found, Share):
        raise RuntimeError(f"a rank failed: {found}")
    return found


def _work(rank: int, ranks: int, store: str, shapes: Sequence[Shape], writer: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks,
            timeout=datetime.timedelta(seconds=SECONDS),
        )  # fmt: skip
        writer.send(share_of(shapes, ranks))
        dist.barrier()  # a process that ends takes its connections along
    except Exception as error:
        writer.send(f"{type(error).__name__}: {error}")


def share_of(shapes: Sequence[Shape], ranks: int) -> Share:
    """In every process of the default group, with the same parameters and gradients."""
    group = dist.group.WORLD
    optimizer = Shampoo(
        counting.parameters(shapes), refresh_every=counting.CYCLE, process_group=group
    )
    optimizer.step()  # makes the state
    with Sent(ranks) as counted:
        for _ in range(counting.CYCLE):
            optimizer.step()
    dist.barrier()
    start, spent = time.perf_counter(), time.process_time()
    for _ in range(counting.CYCLE):
        optimizer.step()
    passed, spent = time.perf_counter() - start, time.process_time() - spent
    kept = sum(
        tensor.nbytes
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name.partition(".")[0].startswith(("left", "right"))
    )
    a_step = 1 / counting.CYCLE
    return Share(
        kept, round(counted.bytes * a_step), counted.count * a_step, spent * a_step, passed * a_step
    )


def work(shapes: Sequence[Shape], ranks: int) -> float:
    """Of the busiest rank, as a part of all: by the costs after which blocks are shared out."""
    each = sharding.spread([s for s in shapes if len(s) > 1], ranks).by_rank(sharding.cost)
    return max(each) / sum(each)
