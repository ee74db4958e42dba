"""Ahead-of-time compilation of the Triton kernels for any target, on a machine without a GPU.

A stand-in for triton's driver names the target; what is compiled is then what the same call would
launch there. Runs in processes of its own (`everything`), so that no other test sees the stand-in.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": "gfx942"}
INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma", "cp.async.bulk.tensor")


def everything(jobs: list[tuple]) -> dict[tuple, dict | str]:
    """{job: facts, or what went wrong}; a job is (target, function, *arguments); two processes."""
    if not jobs:
        return {}
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        return dict(zip(jobs, pool.map(_work, jobs), strict=True))


def _work(job: tuple) -> dict | list | str:
    target, function, *arguments = job
    try:
        return globals()[function](target, *arguments)
    except Exception as error:  # the test that asks for this job fails with it
        return f"{type(error).__name__}: {error}"


def compiled(target: str, kernel, launch) -> dict:
    """Facts about the binary that `kernel[launch.grid](...)` is on `target`."""
    import triton
    from triton.backends.compiler import GPUTarget

    architecture = ARCHITECTURES[target]
    gpu = GPUTarget(
        "hip" if target == "gfx942" else "cuda", architecture, 64 if target == "gfx942" else 32
    )
    triton.runtime.driver.set_active(_Driver(gpu))
    kernel.device_caches.clear()
    binary = kernel.warmup(*launch.arguments, grid=launch.grid, **launch.meta)
    text = binary.asm["amdgcn" if target == "gfx942" else "ptx"]
    stack, registers = (_scratch(text), None) if target == "gfx942" else _usage(binary.asm["cubin"])
    return {
        "shared": binary.metadata.shared,
        "tensor_memory": getattr(binary.metadata, "tmem_size", None) or 0,
        "stack": stack,
        "registers": registers,
        "trap": re.search(r"\bs_trap\b|\btrap;", text) is not None,
        "wide_offsets": re.search(r"arith\.muli .*i64", binary.asm["ttir"]) is not None,
        **{name: text.count(name) for name in INSTRUCTIONS},
    }  # fmt: skip


class _Driver:
    def __init__(self, target):
        self.target = target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


def _usage(cubin: bytes) -> tuple[int, int]:
    """Bytes of stack and local memory, which is where registers spill to, and registers."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.fspath(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
    assert len(found) >= 2, usage
    return sum(map(int, found)), int(re.search(r"REG:(\d+)", usage).group(1))


def _scratch(assembly: str) -> int:
    return int(re.search(r"ScratchSize: (\d+)", assembly).group(1))


def row(target: str, index: int, mode: str, turned: bool, n: int = 160) -> dict:
    """The product kernel with row `index` of the table in this mode, as the row's op calls it;
    turned: with transposed operands (Gᵀ G). Where n is odd, no load or store is of 16 bytes."""
    from shampoo_kernels.kernels import launch, table
    from shampoo_kernels.kernels.product import product_kernel

    chosen = table.ROWS[index]
    table.target = lambda device: target
    select, table.select = table.select, lambda *arguments: chosen
    sixteen = torch.float16 if chosen.op == "product" else torch.bfloat16
    A = torch.empty(2, n, n, dtype=sixteen if mode == "16-bit" else torch.float32)
    A = A.mT if turned else A
    D, other = torch.empty(2, n, n), torch.empty(2, n, n)
    options = {"a": 0.0, "b": 0.5, "c": 0.5, "C": None, "D16": None, "scale16": 1.0,
               "symmetric": False, "measure": None}  # fmt: skip
    options |= {
        "gram_ema_": {"C": D, "symmetric": True},
        "newton": {"C": other, "symmetric": True, "measure": "distance"},
        "product": {"C": D, "D16": other.half()},
        "precondition": {"measure": "squares"},
        "power_iteration": {},
    }[chosen.op]
    try:
        prepared = launch.prepare(A, A.mT, D, op=chosen.op, precision=mode, **options)
    finally:
        table.select = select
    assert prepared.meta["DESCRIPTORS"] == (chosen.form == "descriptor")
    return compiled(target, product_kernel, prepared)


def flow(target: str, op: str, n: int, *arguments) -> list[dict]:
    """Every different kernel that a whole op launches on (2, n, n) tensors: nothing is run, each is
    compiled from the very arguments of its launch."""
    from shampoo_kernels.kernels import (
        eigenvalue_bound,
        gram_ema,
        inverse_root,
        power_iteration,
        precondition,
        product,
        table,
    )
    from shampoo_kernels.ops import roots

    found = {}

    def record(kernel, launch, on):
        key = (kernel.fn.__name__, repr(launch.meta), *(type(x).__name__ for x in launch.arguments))
        if key not in found:
            found[key] = compiled(target, kernel, launch)
            multiplies = kernel is product.product_kernel and launch.arguments[8] > 0
            found[key] |= {"descriptors": launch.meta.get("DESCRIPTORS"), "multiplies": multiplies}

    table.target = lambda device: target
    for module in (eigenvalue_bound, gram_ema, power_iteration, product):
        module.run = record
    G, S = torch.zeros(2, n, n, dtype=torch.bfloat16), torch.zeros(2, n, n)
    if op == "gram_ema_":
        weighted, splits = arguments
        table.splits = lambda *_: splits
        G = G if splits == 1 else torch.zeros(2, 64, n, dtype=G.dtype)  # a sum that can be cut
        weight = S.clone() if weighted else None
        gram_ema.accumulate_(S, G[:, None].mT, weight, torch.zeros(2), 0.5, "highest")
    elif op == "inverse_root":
        method, p, precision = arguments
        one, steps = torch.ones(2), roots.schedule(method, 1e-3, p, torch.float32)
        arithmetic = inverse_root.arithmetic(method, n, p, 1e-3, precision)
        inverse_root.iterate(method, S, one, one > 0, 1e-3, p, steps, arithmetic)
    elif op == "eigenvalue_bound":
        for size in arguments:
            eigenvalue_bound.eigenvalue_bound(torch.zeros(2, size, size))
    elif op == "power_iteration":
        for vectors in arguments:
            power_iteration.power_iteration(S, 2, vectors)
    else:
        precondition.precondition_(torch.empty_like(S), G, S, S, *arguments)
    return list(found.values())


def both_sides(target: str, n: int) -> dict:
    """The experiment of bench/gpu_both_sides.py, with the rows of the table for (2, n, n)."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
    import gpu_both_sides

    from shampoo_kernels.kernels import table

    table.target = lambda device: target
    G, left, right = (torch.empty(2, n, n, dtype=dtype)
                      for dtype in (torch.bfloat16, torch.float32, torch.float32))  # fmt: skip
    launch = gpu_both_sides.prepare(left, right, G, 0.9, 0.1)
    return compiled(target, gpu_both_sides.both_sides_kernel, launch)
