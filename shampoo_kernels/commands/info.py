"""python -m shampoo_kernels info"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import shampoo_kernels
from shampoo_kernels import native

# What the kernels ask for, as /proc/cpuinfo spells it.
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")

BACKENDS = "backends (float32: statistics, factors and results; gradients have 16 or 32 bits there)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same facts for a program")


def run(args: argparse.Namespace) -> int:
    try:
        facts = collect()
    except (ValueError, RuntimeError) as error:  # SHAMPOO_KERNELS_BACKEND asks for what is not here
        print(f"info: {error}", file=sys.stderr)
        return 1
    print(json.dumps(facts, indent=2) if args.json else as_text(facts))
    return 0


def collect() -> dict[str, Any]:
    """Everything that `info` prints, as plain dicts, lists, strings and numbers."""
    return {
        "versions": {
            "shampoo_kernels": shampoo_kernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "triton": _version("triton", "not installed (a CUDA build of torch brings it along)"),
            "numpy": _version("numpy", "not installed (only demo and study need it)"),
        },
        "machine": {"cpu": _cpu(), "gpus": _gpus(), "threads": torch.get_num_threads()},
        "native": _native(),
        "backends": {
            op: {device: served._asdict() for device, served in row.items()}
            for op, row in shampoo_kernels.backends().items()
        },
        "environment": {k: v for k, v in os.environ.items() if k.startswith("SHAMPOO_KERNELS_")},
    }


def as_text(facts: dict[str, Any]) -> str:
    lines: list[str] = []
    for title in ("versions", "machine", "native", "environment"):
        lines += [title] * bool(facts[title])
        lines += [f"  {key:<16} {_join(value)}" for key, value in facts[title].items()]
    lines += [BACKENDS]
    for op, row in facts["backends"].items():
        for device, served in row.items():
            lines.append(f"  {op:<22} {device:<6} {served['backend']:<10} {served['reason']}")
            op = ""
    return "\n".join(lines)


def _join(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _version(package: str, why_not: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return why_not


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} logical cores"
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    found = [name for name in CPU_FEATURES if name in fields.get("flags", "").split()]
    name = fields.get("model name", platform.machine())
    return f"{name}, {os.cpu_count()} logical cores, {' '.join(found) or 'no AVX2'}"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    every = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{gpu.name} (capability {gpu.major}.{gpu.minor})" for gpu in every]


def _native() -> dict[str, Any]:
    if native.lib is None:
        return {"library": native.why_not}
    built = native.lib.build_facts()
    archs, cuda_why_not = built["cuda_archs"], native.facts["cuda_why_not"]
    return {
        "library": native.lib.__file__,
        "compiler": built["compiler"],
        "stable ABI": f"torch {built['torch_target']} or later, built with {native.facts['torch']}",
        "built for": built["isas"],
        "usable here": native.lib.isas(),
        "avx512-generic": "the avx512 code without its instructions, for tests on any CPU",
        "in use": native.lib.isa(),
        "LAPACK": "one call per block" if native.lib.has_lapack() else "not exported by this torch",
        "CUDA C++": f"{archs}: built, unproven" if archs else f"not built: {cuda_why_not}",
    }
