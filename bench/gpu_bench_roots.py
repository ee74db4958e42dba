"""Timings of inverse roots of large blocks on a GPU: rows of gpu_bench.py, in the same run and
table."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gpu_matrices import relative, spectrum, truth
from gpu_timing import Calls, copies, eager, milliseconds, under

from shampoo_kernels import eigenvalue_bound, inverse_root
from shampoo_kernels.kernels import inverse_root as kernels
from shampoo_kernels.ops import roots

OKLS = 27  # products of its schedule, all in fp16


class Work(NamedTuple):
    """What one block's root takes: flops by the kind of product, half of them for symmetric ones,
    and the bytes of every launch's distinct operands and results, as if no cache held any."""

    flops: dict[str, float]
    nbytes: float

    def floor(self, batch: int, n: int, rate: dict[str, float]) -> float:
        """Milliseconds: flops over the rates of this run; bytes of A and its root alone, since the
        rest can stay in the L2."""
        speeds = {"float32": rate["tf32 TFLOP/s"] / 3, "16-bit": rate["bf16 TFLOP/s"]}
        compute = sum(count / speeds[kind] for kind, count in self.flops.items())
        return batch * max(compute / 1e9, 8.0 * n * n / rate["copy GB/s"] / 1e6)

    def __str__(self) -> str:
        return f"{sum(self.flops.values()) / 1e9:.1f} GFLOP, {self.nbytes / 1e6:.0f} MB a block"


def work(method: str, n: int, p: int, ridge: float, precision: str) -> Work:
    """Counted on the launches of the very driver that is timed; nothing is computed."""
    flops, moved = {"float32": 0.0, "16-bit": 0.0}, [0.0]

    def count(A: Any, B: Any, D: torch.Tensor, **options: Any) -> torch.Tensor | None:
        tensors = {id(x): x.nbytes for x in (A, B, D, options.get("D16")) if x is not None}
        moved[0] += sum(tensors.values())
        if (C := options.get("C")) is not None:  # read, though it may be D
            moved[0] += C.nbytes * ((n + 128) / (2 * n) if options.get("symmetric") else 1)
        if A is not None:
            kind = "16-bit" if A.dtype.itemsize == 2 else "float32"
            flops[kind] += n * n * (n + 128.0) if options.get("symmetric") else 2.0 * n**3
        return None if options.get("measure") is None else D.new_empty(1, 1)

    A, one = torch.empty(1, n, n, device="meta"), torch.ones(1, device="meta")
    steps = roots.schedule(method, ridge, 2 if (method, p) == ("product", 1) else p, A.dtype)
    multiply, kernels.multiply = kernels.multiply, count
    try:
        arithmetic = kernels.arithmetic(method, n, p, ridge, precision)
        kernels.iterate(method, A, one, one > 0, ridge, p, steps, arithmetic)
    finally:
        kernels.multiply = multiply
    return Work(flops, moved[0])


def work_of_okls(n: int) -> Work:
    """`half_products`: the cast, and per product an operand read and a result written."""
    return Work({"16-bit": OKLS * 2.0 * n**3}, 6.0 * n * n + OKLS * 4.0 * n * n)


def meta_newton(A: torch.Tensor, p: int, ridge: float, steps: int = 25) -> torch.Tensor:
    """Coupled Newton as usually written, (n, n) or (B, n, n), without its test in every step."""
    eye = torch.eye(A.shape[-1], device=A.device)
    A = A + ridge * eigenvalue_bound(A)[..., None, None] * eye
    z = (1 + p) / (2 * torch.linalg.matrix_norm(A))[..., None, None]
    X, M = z ** (1 / p) * eye.expand_as(A), z * A
    for _ in range(steps):
        T = ((p + 1) * eye - M) / p
        X = X @ T
        M = torch.linalg.matrix_power(T, p) @ M
    return X


def half_products(A: torch.Tensor) -> None:
    """As many fp16 `baddbmm` as the OKLS schedule has (its time, not its root)."""
    H = A.half()
    for _ in range(OKLS):
        H = torch.baddbmm(H, H, H, beta=0.5, alpha=0.5)


def eigensolvers(A: torch.Tensor) -> dict[str, Callable[[], object]]:
    """torch's, and cupy's where that is installed."""
    found = {"torch.linalg.eigh": eager(lambda: torch.linalg.eigh(A))}
    try:
        import cupy

        given = cupy.from_dlpack(A)
        found["cupy.linalg.eigh"] = eager(lambda: cupy.linalg.eigh(given))
    except ImportError:
        pass
    return found


def bench_root(batch: int, n: int, p: int, ridge: float, rate: dict[str, float]) -> dict:
    block = spectrum(n, 1 / ridge, blocks=4)
    rotated = [block.repeat(batch // 4, 1, 1) for _ in copies(4 * batch * n * n)]
    exact, A = truth(block, p, ridge), rotated[0]

    def each(call: Callable[[torch.Tensor], object]) -> Calls:
        return [lambda a=a: call(a) for a in rotated]

    def ours(a: torch.Tensor, method: str, precision: str) -> torch.Tensor:
        return inverse_root(a, p, ridge=ridge, method=method, precision=precision).root

    variants: dict[str, Callable[[torch.Tensor], object]] = {
        "ours": lambda a: ours(a, "newton", "highest"),
        "ours, product high": lambda a: ours(a, "product", "high"),
        f"{OKLS} fp16 baddbmm": half_products,
        "same schedule, fp32 bmm": lambda a: under(
            "reference", lambda: ours(a, "newton", "highest")
        )(),
        "coupled Newton, bmm": lambda a: meta_newton(a, p, ridge),
    }
    calls: dict[str, Calls] = {name: each(call) for name, call in variants.items()}
    calls["coupled Newton, per block"] = [eager(lambda: [meta_newton(a, p, ridge) for a in A])]
    solvers = eigensolvers(block)
    calls |= {name: [call] for name, call in solvers.items()}
    found = milliseconds(calls, rounds=4)
    for name in solvers:  # of four blocks: they take turns on the GPU
        if (value := found[name]) is not None:
            found[name] = value * batch / 4
    errors = {
        name: relative(variants[name](A)[:4], exact).max().item()  # type: ignore[index]
        for name in ("ours", "ours, product high", "same schedule, fp32 bmm", "coupled Newton, bmm")
    }
    counted = {
        "ours": work("newton", n, p, ridge, "highest"),
        "ours, product high": work("product", n, p, ridge, "high"),
        f"{OKLS} fp16 baddbmm": work_of_okls(n),
    }
    return {
        "case": f"inverse_root {batch} x {n}², p = {p}, ridge {ridge:g}",
        "milliseconds": found,
        "floor": counted["ours"].floor(batch, n, rate),
        "error": errors.pop("ours"),
        "errors": errors,
        "floors": {name: each.floor(batch, n, rate) for name, each in counted.items()},
        "work": {name: str(each) for name, each in counted.items()},
    }


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
    root = [(bench_root, (64, 1024, p, ridge)) for ridge in (1e-4, 1e-6) for p in (2, 4)]
    graphs = [(bench_graphs, shape) for shape in ((8, 64), (64, 256), (64, 512))]
    return [*root, (bench_root, (64, 256, 2, 1e-4)), *graphs]
