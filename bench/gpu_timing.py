"""How the rows of gpu_bench*.py are timed, and the rates that their floors are read against.

Every row times ours and its baselines by turns, as CUDA graphs (else launches would be timed) where
they can be captured, over inputs that are rotated past the L2, after a warm-up.
"""

import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from shampoo_kernels import use_backend

# tests/test_dry.py runs all of this on a CPU, where no time means anything.
DEVICE = "cuda"
ROTATED_BYTES, COPIED_BYTES, RATED_N = 200 << 20, 1 << 29, 8192
DEADLINE = time.monotonic() + 300.0
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
Calls = list[Callable[[], object]]


def milliseconds(variants: dict[str, Calls], rounds: int = 15) -> dict[str, float | None]:
    """Median milliseconds of one call of each; None for what raised (said on stderr)."""
    runs: dict[str, tuple[Callable[[], object], int]] = {}
    for name, calls in variants.items():
        try:
            runs[name] = _graph(calls)
        except Exception as error:
            torch.cuda.synchronize()
            print(f"{name}: {type(error).__name__}: {line(error)}", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, count) in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / count)
        if time.monotonic() > DEADLINE:
            break
    return {name: median(times[name][len(times[name]) // 4 :]) if name in times else None
            for name in variants}  # fmt: skip


def _graph(calls: Calls) -> tuple[Callable[[], object], int]:
    """All calls as one graph; what cannot be captured (eigh) runs as it is, once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    if getattr(calls[0], "eager", False):
        return calls[0], 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay, len(calls)


def line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def eager(call: Callable[[], object]) -> Callable[[], object]:
    call.eager = True  # type: ignore[attr-defined]
    return call


def under(backend: str, call: Callable[[], object]) -> Callable[[], object]:
    """The same call on that backend."""

    def run() -> object:
        with use_backend(backend):
            return call()

    return run


def rates() -> dict[str, float]:
    """GB/s of a copy, TFLOP/s of large products."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=DEVICE)
    found = {"copy GB/s": 2 * source.nbytes / _rate([lambda: source.clone()]) / 1e6}
    for name, dtype, tf32 in (
        ("bf16", BFLOAT16, False),
        ("tf32", FLOAT32, True),
        ("fp32", FLOAT32, False),
    ):
        A = torch.randn(RATED_N, RATED_N, device=DEVICE).to(dtype)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        found[f"{name} TFLOP/s"] = 2 * RATED_N**3 / _rate([lambda A=A: A @ A]) / 1e9
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def _rate(calls: Calls) -> float:
    value = milliseconds({"it": calls})["it"]
    assert value is not None
    return value


def copies(nbytes: int) -> range:
    return range(min(64, max(1, -(-ROTATED_BYTES // nbytes))))
