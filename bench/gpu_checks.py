"""What has to hold on a GPU: plain functions, so that they run with pytest (tests/test_gpu.py) and,
where there is none, without: python bench/gpu_checks.py [--small] [--part i/k]

Truth is float64 on the same GPU. `--small` is for compute-sanitizer.
"""

import sys
import time
import traceback
from collections.abc import Callable

import gpu_checks_graphs
import gpu_checks_native
import gpu_checks_products
import gpu_checks_roots
import torch

from shampoo_kernels import use_backend

BACKEND = "triton"  # tests/dry.py: the reference


def checks(small: bool = False) -> dict[str, Callable[[], None]]:
    """{name: function that raises where something does not hold}: Triton's kernels, and CUDA C++'s
    where they are built."""
    named = gpu_checks_products.SMALL | gpu_checks_roots.SMALL
    if not small:
        named = gpu_checks_products.every_row() | named | gpu_checks_products.LARGE
        named |= gpu_checks_roots.LARGE | gpu_checks_graphs.LARGE
    if reason := gpu_checks_native.why_not():
        print(f"CUDA C++ is left out: {reason}", file=sys.stderr)
        return named
    return named | gpu_checks_native.SMALL | ({} if small else gpu_checks_native.LARGE)


def run(function: Callable[[], None]) -> None:
    with use_backend(BACKEND):
        function()
        torch.cuda.synchronize()


def main(argv: list[str]) -> int:
    """[--small] [--part i/k]: every k-th check from the i-th on, so that k processes compile."""
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing was checked", file=sys.stderr)
        return 1
    part = argv[argv.index("--part") + 1] if "--part" in argv else "0/1"
    first, step = map(int, part.split("/"))
    chosen = list(checks("--small" in argv).items())[first::step]
    failed = 0
    for name, function in chosen:
        start = time.perf_counter()
        try:
            run(function)
            print(f"passed  {name} ({time.perf_counter() - start:.1f} s)", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)
    print(f"{len(chosen) - failed} checks passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
