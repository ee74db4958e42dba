"""Timings on a GPU: python bench/gpu_bench.py RESULTS.json [seconds]; the table goes to stdout.

How: gpu_timing.py. Floors are bytes over the copy bandwidth and flops over the GEMM rate, both
measured in this run.
"""

import json
import sys
import time
from collections.abc import Callable

import gpu_timing as timing
import torch
from gpu_matrices import relative, spectrum
from gpu_timing import BFLOAT16, FLOAT32, Calls, copies, line, milliseconds, under

from shampoo_kernels import (
    eigenvalue_bound,
    gram_ema_,
    power_iteration,
    precondition,
    use_backend,
)

BACKEND = "triton"  # tests/test_dry.py: the reference


def bench_gram(batch: int, n: int, dtype: torch.dtype, rate: dict[str, float]) -> dict:
    G = [
        torch.randn(batch, n, n, device=timing.DEVICE).to(dtype) for _ in copies(6 * batch * n * n)
    ]
    S = [torch.zeros(batch, n, n, device=timing.DEVICE) for _ in G]

    def each(call: Callable[[torch.Tensor, torch.Tensor], object]) -> Calls:
        return [lambda s=s, g=g: call(s, g) for s, g in zip(S, G, strict=True)]

    def wide_(s: torch.Tensor, g: torch.Tensor) -> None:
        product = torch.bmm(g, g.mT, out_dtype=FLOAT32)
        s.mul_(0.95).add_(product, alpha=0.05)

    variants = {
        "ours": each(lambda s, g: gram_ema_(s, g, 0.95, 0.05, side="left")),
        "baddbmm_": each(lambda s, g: s.baddbmm_(g.float(), g.float().mT, beta=0.95, alpha=0.05)),
    }
    if batch == 1:
        variants["addmm_"] = each(
            lambda s, g: s[0].addmm_(g[0].float(), g[0].float().mT, beta=0.95, alpha=0.05)
        )
    if dtype == BFLOAT16:
        variants["bmm, out_dtype"] = each(wide_)
        variants["baddbmm, out_dtype"] = each(
            lambda s, g: s.copy_(
                torch.baddbmm(s, g, g.mT, beta=0.95, alpha=0.05, out_dtype=FLOAT32)
            )
        )
    found = milliseconds(variants)
    stat = gram_ema_(torch.zeros_like(S[0]), G[0], 0.0, 1.0, side="left")
    exact = G[0][:1].double() @ G[0][:1].double().mT
    flops = batch * n * n * (n + 128.0)
    moved = batch * n * n * (G[0].element_size() + 6.0)
    peak = rate["bf16 TFLOP/s"] if dtype == BFLOAT16 else rate["tf32 TFLOP/s"] / 3
    floor = max(flops / peak / 1e9, moved / rate["copy GB/s"] / 1e6)
    name = str(dtype).removeprefix("torch.")
    return {"case": f"gram_ema_ {batch} x {n}², {name}", "milliseconds": found, "floor": floor,
            "error": relative(stat[:1], exact).max().item()}  # fmt: skip


def bench_precondition(batch: int, n: int, rate: dict[str, float]) -> dict:
    G = torch.randn(batch, n, n, device=timing.DEVICE).bfloat16()
    L, R = (
        torch.randn(batch, n, n, device=timing.DEVICE),
        torch.randn(batch, n, n, device=timing.DEVICE),
    )
    found = milliseconds({
        "ours": [lambda: precondition(G, L, R)],
        "two fp32 bmm and a norm": [lambda: (L @ G.float() @ R).square().sum((1, 2))],
    })  # fmt: skip
    exact = L[:1].double() @ G[:1].double() @ R[:1].double()
    floor = 4.0 * batch * n**3 / (rate["tf32 TFLOP/s"] / 3) / 1e9
    return {"case": f"precondition {batch} x {n}²", "milliseconds": found, "floor": floor,
            "error": relative(precondition(G, L, R)[0][:1], exact).max().item()}  # fmt: skip


def bench_bound(batch: int, n: int, rate: dict[str, float]) -> dict:
    A = [spectrum(n, 1e3, blocks=1).repeat(batch, 1, 1) for _ in copies(4 * batch * n * n)]

    found = milliseconds({
        "ours": [lambda a=a: eigenvalue_bound(a) for a in A],
        "reference": [under("reference", lambda a=a: eigenvalue_bound(a)) for a in A],
        "Frobenius": [lambda a=a: torch.linalg.matrix_norm(a) for a in A],
    })  # fmt: skip
    floor = 2.0 * batch * n * (n + 1) / rate["copy GB/s"] / 1e6
    expected: torch.Tensor = under("reference", lambda: eigenvalue_bound(A[0]))()  # type: ignore
    error = (eigenvalue_bound(A[0]) / expected - 1).abs().max().item()
    return {"case": f"eigenvalue_bound {batch} x {n}²", "milliseconds": found, "floor": floor,
            "error": error}  # fmt: skip


def bench_power(batch: int, n: int, rate: dict[str, float]) -> dict:
    A = [spectrum(n, 1e3, blocks=1).repeat(batch, 1, 1) for _ in copies(4 * batch * n * n)]
    found = milliseconds({
        "ours": [lambda a=a: power_iteration(a) for a in A],
        "ours, one vector": [lambda a=a: power_iteration(a, 10, 1) for a in A],
        "12 bmm of 16 columns": [lambda a=a: [a @ a[:, :, :16] for _ in range(12)] for a in A],
    })  # fmt: skip
    floor = 12 * 4.0 * batch * n * n / rate["copy GB/s"] / 1e6
    exact = torch.linalg.eigvalsh(A[0][:1].double())[:, -1]
    error = (power_iteration(A[0][:1]).double() / exact - 1).abs().max().item()
    return {"case": f"power_iteration {batch} x {n}², 10 steps, 16 vectors", "milliseconds": found,
            "floor": floor, "error": error}  # fmt: skip


def jobs() -> list[tuple[Callable[..., dict], tuple]]:
    sizes = [(1, 1024), (1, 2048), (1, 4096), (1, 8192), (64, 256), (64, 512), (64, 1024)]
    gram = [(bench_gram, (batch, n, dtype)) for batch, n in sizes for dtype in (BFLOAT16, FLOAT32)]
    bounds = [(bench_bound, shape) for shape in ((64, 256), (64, 1024), (1, 4096))]
    power = [(bench_power, shape) for shape in ((64, 256), (64, 1024), (1, 4096))]
    return [*gram, (bench_precondition, (64, 1024)), *bounds, *power]


def markdown(results: dict) -> str:
    rate = ", ".join(f"{name} {value:.0f}" for name, value in results["rates"].items())
    lines = [
        f"{results['gpu']}, torch {results['torch']}, triton {results['triton']}.",
        f"In this run: {rate}. Milliseconds; in brackets how many times faster ours is.",
        "",
        "| case | ours | % of floor | error | baselines |",
        "|" + " --- |" * 5,
    ]
    for row in results["rows"]:
        times = dict(row["milliseconds"])
        ours = times.pop("ours")
        cells = [f"{name} {t:.4g} (**{t / ours:.2f}x**)" for name, t in times.items() if ours and t]
        floor = f"{100 * row['floor'] / ours:.0f}" if row["floor"] and ours else ""
        shown = "failed" if ours is None else f"{ours:.4g}"
        lines.append(
            f"| {row['case']} | {shown} | {floor} | {row['error']:.1e} | {'; '.join(cells)} |"
        )
        lines += more(row)
    return "\n".join([*lines, *("", *results["left out"])])


def more(row: dict) -> list[str]:
    """Lines for the errors, the shares of their own floors and the work of others than ours."""
    errors, floors, work = (row.get(name, {}) for name in ("errors", "floors", "work"))
    lines = []
    for name in dict.fromkeys([*errors, *work]):
        time = row["milliseconds"].get(name)
        share = f"{100 * floors[name] / time:.0f}" if name in floors and time else ""
        error = f"{errors[name]:.1e}" if name in errors else ""
        said = f"{name}: {work[name]}" if name in work else name
        lines.append(f"| | | {share} | {error} | {said} |")
    return lines


def main(argv: list[str]) -> int:
    """RESULTS.json [seconds]"""
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing was measured", file=sys.stderr)
        return 1
    import triton

    timing.DEADLINE = time.monotonic() + (float(argv[1]) if len(argv) > 1 else 300.0)
    results: dict = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rates": timing.rates(),
        "rows": [],
        "left out": [],
    }
    from gpu_bench_native import jobs as native_jobs
    from gpu_bench_peers import jobs as peer_jobs
    from gpu_bench_quack import jobs as quack_jobs
    from gpu_bench_roots import jobs as root_jobs
    from gpu_bench_steps import jobs as step_jobs
    from gpu_both_sides import jobs as both_jobs

    every = native_jobs() + jobs() + root_jobs() + both_jobs()
    every += quack_jobs() + step_jobs() + peer_jobs()
    with use_backend(BACKEND):
        for function, arguments in every:
            name = f"{function.__name__}{arguments}"[:80]
            if time.monotonic() > timing.DEADLINE:
                results["left out"].append(f"not measured, out of time: {name}")
                continue
            try:
                results["rows"].append(function(*arguments, results["rates"]))
            except Exception as error:
                results["left out"].append(f"failed: {name}: {type(error).__name__}: {line(error)}")
            torch.cuda.empty_cache()
    with open(argv[0], "w") as file:
        json.dump(results, file, indent=1)
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
