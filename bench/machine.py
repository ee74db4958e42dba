"""The machine that a run is read against: versions, and its peaks, measured at the start."""

import os
import platform
import statistics
from importlib import metadata

import rivals
import torch

import shampoo_kernels
from shampoo_kernels import native
from shampoo_kernels.commands._timing import timed

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def facts(quick: bool) -> dict:
    """Versions, GFLOP/s of large products and of FMA alone, GB/s of a copy."""
    found = {
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "shampoo_kernels": shampoo_kernels.__version__,
        "peers": {name: _version(name) for name in rivals.PACKAGES if _version(name)},
        "threads": torch.get_num_threads(),
        "isa": native.lib.isa() if native.lib else f"no extension: {native.why_not}",
        "command": "QUICK=1 make bench" if quick else "make bench",
        "quick": quick,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gemm_gflops": {str(dtype).removeprefix("torch."): _gemm(dtype) for dtype in DTYPES},
        "copy_gbs": _copy(),
    }
    if native.lib:
        found["fma_gflops"] = native.lib.peak_gflops()
    return found


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        return f"{named['model name']} (family {named['cpu family']}, model {named['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gemm(dtype: torch.dtype, n: int = 1024) -> float:
    A, B = (torch.randn(n, n).to(dtype) for _ in range(2))
    return 2 * n**3 / _seconds(lambda: torch.mm(A, B)) / 1e9


def _copy(size: int = 1 << 28) -> float:
    """Read and written, from and to the memory: four times what a large cache holds."""
    source = torch.randn(size // 4)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source)) / 1e9


def _seconds(function, rounds: int = 9) -> float:
    function()
    return statistics.median(timed(function) for _ in range(rounds))
