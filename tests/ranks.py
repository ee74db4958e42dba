"""Several processes of one test, with gloo on the CPU, that end in time whatever happens."""

import datetime
import multiprocessing
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)


def run(world, function, *args, seconds=120):
    """[function(rank, *args) for each rank], each in a process of its own; results go by file.

    Fails with the traceback of the first rank that raised, or if one is not done in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "shampoo_kernels"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, world, folder, seconds, function, args))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in late:
            processes[rank].kill()
            processes[rank].join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.txt"))]
        assert not errors, errors[0]
        assert not late, f"ranks {late} of {world} did not end in {seconds} s"
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


def _rank(rank, world, folder, seconds, function, args):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=seconds / 2),
        )
        torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
    except BaseException:
        (Path(folder) / f"{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
