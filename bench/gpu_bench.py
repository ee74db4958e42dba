"""Timings on a GPU: python bench/gpu_bench.py RESULTS.json [seconds]; the table goes to stdout.

How: gpu_timing.py. Floors are bytes over the copy bandwidth and flops over the GEMM rate, both
measured in this run.
"""

import json
import os
import sys
import time
from collections.abc import Callable

import gpu_timing as timing
import torch
from gpu_matrices import relative, spectrum, truth
from gpu_timing import BFLOAT16, FLOAT32, Calls, copies, eager, line, milliseconds, under

import shampoo_kernels
from shampoo_kernels import (
    eigenvalue_bound,
    gram_ema_,
    inverse_root,
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


def meta_newton(A: torch.Tensor, p: int, ridge: float, steps: int = 25) -> torch.Tensor:
    """Coupled Newton as usually written, (n, n) or (B, n, n), without its test in every step."""
    eye = torch.eye(A.shape[-1], device=A.device)
    A = A + ridge * shampoo_kernels.eigenvalue_bound(A)[..., None, None] * eye
    z = (1 + p) / (2 * torch.linalg.matrix_norm(A))[..., None, None]
    X, M = z ** (1 / p) * eye.expand_as(A), z * A
    for _ in range(steps):
        T = ((p + 1) * eye - M) / p
        X = X @ T
        M = torch.linalg.matrix_power(T, p) @ M
    return X


def half_products(A: torch.Tensor, count: int = 27) -> None:
    """As many fp16 `baddbmm` as the OKLS schedule has (its time, not its root)."""
    H = A.half()
    for _ in range(count):
        H = torch.baddbmm(H, H, H, beta=0.5, alpha=0.5)


def bench_root(batch: int, n: int, p: int, ridge: float, rate: dict[str, float]) -> dict:
    A = spectrum(n, 1 / ridge, blocks=4).repeat(batch // 4, 1, 1)
    exact = truth(A[:4], p, ridge)

    def ours(method: str, precision: str) -> torch.Tensor:
        return inverse_root(A, p, ridge=ridge, method=method, precision=precision).root

    variants: dict[str, Callable[[], object]] = {
        "ours": lambda: ours("newton", "highest"),
        "ours, product high": lambda: ours("product", "high"),
        "27 fp16 baddbmm": lambda: half_products(A),
        "same schedule, fp32 bmm": under("reference", lambda: ours("newton", "highest")),
        "coupled Newton, bmm": lambda: meta_newton(A, p, ridge),
        "coupled Newton, per block": eager(lambda: [meta_newton(a, p, ridge) for a in A]),
        "torch.linalg.eigh, 4 blocks": eager(lambda: torch.linalg.eigh(A[:4])),
    }
    found = milliseconds({name: [call] for name, call in variants.items()}, rounds=4)
    if (eigh := found.pop("torch.linalg.eigh, 4 blocks")) is not None:
        found["torch.linalg.eigh"] = eigh * batch / 4
    errors = {
        name: relative(call()[:4], exact).max().item()  # type: ignore[index]
        for name, call in variants.items()
        if name in ("ours", "ours, product high", "same schedule, fp32 bmm", "coupled Newton, bmm")
    }
    return {
        "case": f"inverse_root {batch} x {n}², p = {p}, ridge {ridge:g}",
        "milliseconds": found,
        "floor": None,
        "error": errors.pop("ours"),
        "errors": errors,
    }


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
    A = spectrum(n, 1e3, blocks=1).repeat(batch, 1, 1)
    found = milliseconds({
        "ours": [lambda: power_iteration(A)],
        "ours, one vector": [lambda: power_iteration(A, 10, 1)],
        "12 bmm of 16 columns": [lambda: [A @ A[:, :, :16] for _ in range(12)]],
    })  # fmt: skip
    floor = 12 * 4.0 * batch * n * n / rate["copy GB/s"] / 1e6
    exact = torch.linalg.eigvalsh(A[:1].double())[:, -1]
    error = (power_iteration(A[:1]).double() / exact - 1).abs().max().item()
    return {"case": f"power_iteration {batch} x {n}², 10 steps, 16 vectors", "milliseconds": found,
            "floor": floor, "error": error}  # fmt: skip


def bench_graphs(batch: int, n: int, rate: dict[str, float]) -> dict:
    """A refresh as users call it, launches and all, with and without the package's own graphs."""
    A = spectrum(n, 1e3, blocks=1).repeat(batch, 1, 1)

    def refresh(graphs: str) -> torch.Tensor:
        os.environ["SHAMPOO_KERNELS_GRAPHS"] = graphs
        return inverse_root(A, 2, ridge=1e-3, method="newton").root

    try:
        found = milliseconds({
            "ours": [eager(lambda: refresh("1"))], "no graph": [eager(lambda: refresh("0"))],
        })  # fmt: skip
        error = relative(refresh("1")[:1], truth(A[:1], 2, 1e-3)).max().item()
    finally:
        os.environ.pop("SHAMPOO_KERNELS_GRAPHS", None)
    return {"case": f"inverse_root by own graph {batch} x {n}²", "milliseconds": found,
            "floor": None, "error": error}  # fmt: skip


def jobs() -> list[tuple[Callable[..., dict], tuple]]:
    sizes = [(1, 1024), (1, 2048), (1, 4096), (1, 8192), (64, 256), (64, 512), (64, 1024)]
    gram = [(bench_gram, (batch, n, dtype)) for batch, n in sizes for dtype in (BFLOAT16, FLOAT32)]
    root = [(bench_root, (64, 1024, p, ridge)) for ridge in (1e-4, 1e-6) for p in (2, 4)]
    bounds = [(bench_bound, shape) for shape in ((64, 256), (64, 1024), (1, 4096))]
    power = [(bench_power, shape) for shape in ((64, 256), (64, 1024), (1, 4096))]
    graphs = [(bench_graphs, shape) for shape in ((8, 64), (64, 256), (64, 512))]
    more = [(bench_root, (64, 256, 2, 1e-4)), (bench_precondition, (64, 1024))]
    return [*gram, *root, *more, *bounds, *power, *graphs]


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
        lines += [f"| | | | {e:.1e} | {name} |" for name, e in row.get("errors", {}).items()]
    return "\n".join([*lines, *("", *results["left out"])])


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
    from gpu_bench_steps import jobs as step_jobs

    every = native_jobs() + jobs() + quack_jobs() + step_jobs() + peer_jobs()
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
