"""The machine's measured peaks, and the Markdown table of one benchmark run.

python bench/report.py results.json > results.md
"""

import json
import platform
import sys
import time
from collections import defaultdict
from statistics import median

import torch

import shampoo_kernels
from shampoo_kernels import native


def machine() -> dict:
    """What the table is read against, measured now: GFLOP/s of large products, GB/s of a copy."""
    facts = {
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "shampoo_kernels": shampoo_kernels.__version__,
        "threads": torch.get_num_threads(),
        "isa": native.lib.isa() if native.lib else f"no extension: {native.why_not}",
        "gemm_gflops": {
            name: _gemm(dtype)
            for name, dtype in (("float32", torch.float32), ("float64", torch.float64))
        },
        "copy_gbs": _copy(),
    }
    if native.lib:
        facts["fma_gflops"] = native.lib.peak_gflops()
    return facts


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        return f"{named['model name']} (family {named['cpu family']}, model {named['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def _gemm(dtype: torch.dtype, n: int = 1024) -> float:
    A, B = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    return 2 * n**3 / _seconds(lambda: torch.mm(A, B)) / 1e9


def _copy(size: int = 1 << 26) -> float:
    source = torch.randn(size // 4)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source)) / 1e9


def _seconds(function, rounds: int = 9) -> float:
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times)


def markdown(results: dict) -> str:
    """One table an op. Medians; in brackets how many times faster ours is in the same run."""
    facts = results["machine_info"]["shampoo_kernels"]
    peaks = ", ".join(f"{name} GEMM {rate:.0f}" for name, rate in facts["gemm_gflops"].items())
    if "fma_gflops" in facts:
        peaks += f", FMA peak {facts['fma_gflops']:.0f}"
    lines = [
        f"{facts['cpu']}, {facts['threads']} threads, kernels: {facts['isa']}, "
        f"torch {facts['torch']}, shampoo_kernels {facts['shampoo_kernels']} "
        f"({results['commit_info'].get('id') or 'no commit'}), {results['datetime'][:10]}.",
        f"Measured in this run: {peaks} GFLOP/s; copy {facts['copy_gbs']:.0f} GB/s. Medians of "
        "alternating rounds, ± the interquartile range; errors against float64; in brackets how "
        "many times faster ours is.",
    ]
    groups = defaultdict(list)
    for row in results["benchmarks"]:
        groups[row["group"] or row["fullname"].split("/")[-1].split("::")[0]].append(row)
    for name, rows in groups.items():
        lines += ["", f"### {name.removeprefix('bench_').removesuffix('.py')}", ""]
        lines += _table(rows, facts)
    return "\n".join(lines)


def _table(rows: list[dict], facts: dict) -> list[str]:
    """A row a case; a column for every baseline: milliseconds, the speed-up over it, its error."""
    names = list(dict.fromkeys(name for row in rows for name in row["extra_info"]["baselines"]))
    header = ["case", "ours, ms", "error", "% of FMA peak", *(f"{n}, ms" for n in names)]
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for row in rows:
        info, stats = row["extra_info"], row["stats"]
        ours, errors, peak = stats["median"], info["errors"], facts.get("fma_gflops")
        cells = [info["case"], f"{1e3 * ours:.3g} ± {100 * stats['iqr'] / ours:.0f} %"]
        cells.append(_error(errors.get("ours")))
        cells.append(f"{info['flops'] / ours / 1e7 / peak:.0f}" if info["flops"] and peak else "")
        for name in names:
            seconds, error = info["baselines"].get(name), _error(errors.get(name))
            ratio = "" if seconds is None else f"{1e3 * seconds:.3g} (**{seconds / ours:.2f}x**)"
            cells.append(f"{ratio} {error}".strip())
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(markdown(json.load(file)))
