"""What has to hold on a GPU: plain functions, so that they run with pytest (tests/test_gpu.py) and,
where there is none, without: python bench/gpu_checks.py [--small] [--part i/k]

Truth is float64 on the same GPU. `--small` is for compute-sanitizer.
"""

import functools
import math
import os
import sys
import time
import traceback
from collections.abc import Callable

import gpu_checks_native
import torch

from shampoo_kernels import (
    eigenvalue_bound,
    gram_ema_,
    inverse_root,
    kronecker_power_step,
    power_iteration,
    precondition,
    use_backend,
)
from shampoo_kernels.kernels import graphs, table
from shampoo_kernels.kernels.product import product

# tests/test_dry.py runs all of this on a CPU, by the reference and with small SIZES.
DEVICE, BACKEND, COMPILER = "cuda", "triton", "inductor"
SIZES = {
    "race": (4096, 256, 100),  # n, k, repeats
    "wide offsets": (8192, 33),  # n, blocks: more than 2^31 elements
    "roots": (33, 128, 260),
    "bounds": (1, 33, 512, 1100),
    "workspace": (512, 160),  # n, blocks
}
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# Largest relative error of one product of float32 operands in each mode; those of bfloat16 and
# float16 tensors are exact. tf32 may truncate: 2^-10 an operand.
UNITS = {"16-bit": 0.0, "ieee": 0.0, "tf32x3": 2.0**-19, "bf16x6": 2.0**-19, "bf16x3": 2.0**-14,
         "tf32": 2.0**-9, "bf16": 2.0**-7}  # fmt: skip


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = FLOAT32) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def integers(*shape: int, largest: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator, device=DEVICE)


def poisoned(*shape: int, dtype: torch.dtype = FLOAT32) -> torch.Tensor:
    return torch.full(shape, math.nan, device=DEVICE, dtype=dtype)


def relative(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    return (X.double() - Y.double()).norm(dim=(-2, -1)) / Y.double().norm(dim=(-2, -1))


def rows() -> list[tuple[table.Row, str]]:
    """Every row of the table that serves this GPU, in each of its modes."""
    if not torch.cuda.is_available():
        return []
    here = table.target(torch.device(DEVICE, torch.cuda.current_device()))
    return [(row, mode) for row in table.ROWS if row.target == here for mode in row.modes]


def check_row(row: table.Row, mode: str) -> None:
    """One row against float64, full and symmetric, sizes that are no multiples of its tiles, odd in
    pointer form; integers come out exact; nothing is left of the NaN that the outputs held."""
    dtype = BFLOAT16 if mode == "16-bit" else FLOAT32
    n, k = (272, 144) if row.form == "descriptor" else (131, 67)
    original = table.select
    table.select = lambda *_: row  # type: ignore[assignment]
    try:
        A = draw(3, n, k, dtype=dtype)
        _check_product(A, A.mT, row.op, mode)
        exact, D = integers(3, k, n).to(dtype), poisoned(3, n, n)
        product(exact.mT, exact, D, op=row.op, symmetric=True, precision=mode)
        assert torch.equal(D, (exact.double().mT @ exact.double()).float())
    finally:
        table.select = original


def _check_product(A: torch.Tensor, B: torch.Tensor, op: str, mode: str) -> None:
    n, k = A.shape[-2:]
    C = draw(3, n, n, seed=1)
    C = C + C.mT
    a, b, c = 0.5, 0.9, torch.tensor([-0.3, 0.0, 2.0], device=DEVICE)
    size = A.double().abs() @ B.double().abs()
    value = A.double() @ B.double() * c.double()[:, None, None] + 0.9 * C.double()
    value += 0.5 * torch.eye(n, device=DEVICE, dtype=torch.float64)
    unit = UNITS[mode] + (k + 8) * 2.0**-22  # tensor cores may truncate while they sum
    bound = unit * c.abs()[:, None, None] * size + 1e-6 * C.abs() + 1e-6
    for symmetric in (False, True):
        D, D16 = (C.clone() if symmetric else poisoned(3, n, n)), poisoned(3, n, n, dtype=FLOAT16)
        found = product(A, B, D, op=op, a=a, b=b, c=c, C=D if symmetric else C, D16=D16,
                        scale16=0.25, symmetric=symmetric, measure="distance",
                        precision=mode)  # fmt: skip
        assert ((D.double() - value).abs() <= bound).all(), (n, k, symmetric)
        assert torch.equal(D16, (0.25 * D).to(FLOAT16))
        assert found is not None
        distance = (D - torch.eye(n, device=DEVICE)).abs().amax((1, 2))
        assert torch.equal(found.amax(1), distance)
        assert not symmetric or torch.equal(D, D.mT)


def check_gram() -> None:
    """The public op: sides, dtypes, odd strides, weights, factors that are zero read nothing."""
    for m, n in ((1, 9), (64, 48), (131, 67), (8, 8192)):
        for dtype in (FLOAT32, BFLOAT16, FLOAT16):
            for side in ("left", "right"):
                grad = draw(3, m, n, dtype=dtype)
                G = grad.double() if side == "left" else grad.double().mT
                kept, summed = G.shape[-2:]
                if kept > 1000:
                    continue
                weights: list[torch.Tensor | None] = [None]
                if summed <= 1000:
                    weight = draw(3, summed, summed, seed=2)
                    weights.append(weight + weight.mT)
                for W in weights:
                    stat = draw(3, kept, kept, seed=1)
                    old = stat.double().tril() + stat.double().tril(-1).mT
                    beta = torch.tensor([0.9, 0.0, 1.0], device=DEVICE)
                    stat[1] = math.nan
                    gram_ema_(stat, grad, beta, 0.3, side=side, weight=W)
                    old[1] = 0
                    middle = G if W is None else G @ W.double()
                    value = beta[:, None, None].double() * old + 0.3 * (middle @ G.mT)
                    size = G.abs() @ (G.abs().mT if W is None else W.double().abs() @ G.abs().mT)
                    assert torch.equal(stat, stat.mT)
                    bound = (2.0**-18 + summed * 2.0**-22) * size + 1e-6 * old.abs() + 1e-6
                    assert ((stat.double() - value).abs() <= bound).all(), (m, n, dtype, side)
    stat, bad = draw(2, 40, 40), poisoned(2, 40, 30)
    expected = 0.5 * (stat.tril() + stat.tril(-1).mT)
    assert torch.equal(gram_ema_(stat, bad, 0.5, 0.0, side="left"), expected)


def check_race() -> None:
    """In place, 100 times, n = 4096, in integers, which are exact: a tile that reads what another
    program wrote, or is written twice, shows."""
    n, k, repeats = SIZES["race"]
    G = integers(1, n, k, largest=1).to(BFLOAT16)
    once = (G.float() @ G.float().mT).round()
    stat = torch.zeros(1, n, n, device=DEVICE)
    for _ in range(repeats):
        gram_ema_(stat, G, 1.0, 1.0, side="left")
    assert torch.equal(stat, repeats * once)


def check_wide_offsets() -> None:
    """A stack of more than 2^31 elements: its last block is where it should be."""
    n, blocks = SIZES["wide offsets"]
    if torch.cuda.mem_get_info()[0] < 2.5 * blocks * n * n * 2 + 6e9:
        return
    G = torch.zeros(blocks, n, n, device=DEVICE, dtype=BFLOAT16)
    G[-1, :, :64] = integers(n, 64, largest=2).to(BFLOAT16)
    stat = torch.zeros(1, n, n, device=DEVICE)
    gram_ema_(stat, G[-1:], 0.0, 1.0, side="left")
    part = G[-1, :, :64].float()
    assert torch.equal(stat[0], part @ part.mT)
    D = torch.empty(blocks, 64, 64, device=DEVICE)
    product(G[:, -64:], G[:, -64:].mT, D, op="gram_ema_", symmetric=True)
    assert torch.equal(D[-1], part[-64:] @ part[-64:].mT)


def spectrum(n: int, kappa: float, blocks: int = 2) -> torch.Tensor:
    Q = torch.linalg.qr(draw(blocks, n, n).double()).Q
    values = torch.logspace(0, -math.log10(kappa), n, dtype=torch.float64, device=DEVICE)
    A = (Q * values) @ Q.mT
    return ((A + A.mT) / 2).float()


def truth(A: torch.Tensor, p: int, ridge: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(A.double())
    shifted = values.clamp(min=0) + ridge * eigenvalue_bound(A).double()[..., None]
    return (vectors * shifted.pow(-1 / p)[..., None, :]) @ vectors.mT


ROOTS = [(m, p, w) for m in ("newton", "product") for p in (1, 2, 4) for w in ("highest", "high")]


def check_root(method: str, p: int, precision: str) -> None:
    """Random spectra, low rank, NaN, both sides of the switch between kinds of operands; the error
    within a multiple of unit * sqrt(kappa) for products of 16 bits, unit * kappa in float32."""
    for n in SIZES["roots"]:
        for ridge in (1e-4, 1e-6):
            if (method, precision) == ("newton", "high") and ridge < 1e-4:
                continue
            G = draw(1, n, 16)
            A = torch.cat([spectrum(n, 1 / ridge), G @ G.mT, poisoned(1, n, n)])
            result = inverse_root(A.tril(), p, ridge=ridge, method=method, precision=precision)
            assert result.status.tolist() == [0, 0, 0, 3], (n, ridge, result)
            assert result.root.isfinite().all()
            assert torch.equal(result.root, result.root.mT)
            error = relative(result.root[:3], truth(A[:3], p, ridge)).max().item()
            low = precision == "high" and ridge == 1e-4
            most = 32 * 2.0**-11 * ridge**-0.5 / p if low else 32 * 2.0**-24 * ridge**-1 / p
            assert error <= max(most, 1e-5), (n, ridge, error, most)


def check_tiny_and_huge() -> None:
    """Scales whose inverse is no float32: powers of two change nothing but the root's own power."""
    A = spectrum(40, 100.0)
    one = inverse_root(A, 2, ridge=1e-3, method="newton").root
    for exponent in (-130, -126, -60, 60, 126):
        scaled = (A.double() * 2.0**exponent).float()
        for method in ("newton", "product"):
            result = inverse_root(scaled, 2, ridge=1e-3, method=method)
            assert result.status.tolist() == [0, 0], (exponent, method)
            error = relative(result.root, one.double() * 2.0 ** (-exponent / 2)).max()
            assert error < 1e-4, (exponent, method, error)


def bounded(n: int) -> torch.Tensor:
    """Flat, nearly flat, spiked, zero-row, rank-one and indefinite blocks, float64."""
    Q = torch.linalg.qr(draw(n, n).double()).Q
    ramp = torch.arange(1, n + 1, device=DEVICE, dtype=torch.float64)
    spectra = (torch.ones_like(ramp), 1 + 1e-6 * ramp / n, torch.where(ramp == n, 1.0, 1e-4),
               ramp / n, torch.where(ramp == 1, 1.0, 0.0), ramp / n - 0.5)  # fmt: skip
    A = torch.stack([(Q * values) @ Q.mT for values in spectra])
    A[3, ::3], A[3, :, ::3] = 0, 0
    return (A + A.mT) / 2


def check_bound() -> None:
    """Strict at every scale, as the reference to the last place; NaN, Inf and zero blocks."""
    for n in SIZES["bounds"]:
        exact = bounded(n)
        for scale in (1e-30, 1.0, 1e30):
            A = (exact * scale).float()
            bound = eigenvalue_bound(A + poisoned(n, n).triu(1))
            largest = torch.linalg.eigvalsh(A.double())[:, -1]
            slack = 1e-14 * n * A.double().norm(dim=(1, 2))  # of float64's eigvalsh
            assert (bound.double() >= largest - slack).all(), (n, scale)
            with use_backend("reference"):
                expected = eigenvalue_bound(A)
            torch.testing.assert_close(bound, expected, rtol=2.0**-22, atol=0)
            assert torch.equal(eigenvalue_bound(A[2:3]), bound[2:3])
        A[0, n - 1, 0], A[1, n // 2, n // 2], A[2] = math.nan, math.inf, 0
        found = eigenvalue_bound(A)
        assert found[0].isnan(), n
        assert found[1] == math.inf, n
        assert found[2] == 0, n
        assert torch.equal(found[3:], bound[3:]), n


def check_power_iteration() -> None:
    """From below, close, alone: as the laws of tests/test_power_iteration.py."""
    for n in SIZES["roots"]:
        A = torch.cat([spectrum(n, 1e2, 1), spectrum(n, 1e6, 1), poisoned(1, n, n)])
        estimate = power_iteration(A)
        truth = torch.linalg.eigvalsh(A[:2].double()).abs().amax(-1)
        assert (estimate[:2].double() <= truth * (1 + 4 * 2.0**-23 * n**0.5)).all(), n
        assert (estimate[:2].double() >= 0.97 * truth).all(), n
        assert estimate[2].isnan(), n
        assert torch.equal(power_iteration(A[:1], 10, 1), power_iteration(A, 10, 1)[:1]), n
        assert (power_iteration(1e30 * A[:2]) / 1e30 - estimate[:2]).abs().max() < 1e-4, n


def check_power_step_and_precondition() -> None:
    grads, left, right = draw(2, 3, 65, 40, dtype=BFLOAT16), spectrum(65, 10.0), spectrum(40, 10.0)
    new = kronecker_power_step(grads, left, right)
    with use_backend("reference"):
        expected = kronecker_power_step(grads, left.double(), right.double())
    for x, y in zip(new, expected, strict=True):
        assert (relative(x, y) < 1e-5).all()
    grad = grads[:, 0]
    for factors in ((left, right), (left, None), (None, right)):
        out, norm = precondition(grad, *factors)
        with use_backend("reference"):
            wide = (f if f is None else f.double() for f in factors)
            exact, _ = precondition(grad.double(), *wide)
        assert (relative(out, exact) < 1e-5).all()
        squares = out.double().square().sum((1, 2))
        torch.testing.assert_close(norm.double(), squares, rtol=1e-6, atol=0)
        assert torch.equal(precondition(grad, *factors)[1], norm)


def capture(function: Callable[[], list[torch.Tensor]], stream: torch.cuda.Stream) -> tuple:
    """(graph, what the function returned while it was captured)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        return graph, function()


def check_own_graphs() -> None:
    """SHAMPOO_KERNELS_GRAPHS=1: the bits of a refresh without graphs, for numbers that change."""
    previous = os.environ.pop("SHAMPOO_KERNELS_GRAPHS", None)
    try:
        for method, precision in (("newton", "highest"), ("product", "high")):
            for seed in range(3):
                A = spectrum(64, 10.0 ** (seed + 1))
                options = {"ridge": 1e-3, "method": method, "precision": precision,
                           "previous": spectrum(64, 2.0)}  # fmt: skip
                os.environ["SHAMPOO_KERNELS_GRAPHS"] = "0"
                expected = inverse_root(A, 2, **options)
                os.environ["SHAMPOO_KERNELS_GRAPHS"] = "1"
                result = inverse_root(A, 2, **options)
                assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))
                assert BACKEND != "triton" or graphs.cache.graphs
    finally:
        os.environ.pop("SHAMPOO_KERNELS_GRAPHS")
        if previous is not None:
            os.environ["SHAMPOO_KERNELS_GRAPHS"] = previous


def check_no_synchronisation_and_graphs() -> None:
    """Every op runs under torch's synchronisation check, is captured, and replays the same bits."""
    A, grad = spectrum(96, 1e3), draw(2, 96, 64, dtype=BFLOAT16)
    stat, previous = torch.zeros(2, 96, 96, device=DEVICE), spectrum(96, 10.0)

    def everything() -> list[torch.Tensor]:
        gram_ema_(stat, grad, 0.0, 1.0, side="left")
        newton = inverse_root(A, 2, method="newton", previous=previous)
        other = inverse_root(A, 4, ridge=1e-3, method="product", precision="high")
        bounds = eigenvalue_bound(A), power_iteration(A, 3)
        return [stat, *newton, *other, *precondition(grad, newton.root, None), *bounds]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        everything()
        stream.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = [x.clone() for x in everything()]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stream.synchronize()
    graph, captured = capture(everything, stream)
    for x in captured:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))


def check_torch_library() -> None:
    """opcheck, and torch.compile without a graph break."""
    stat, grad = torch.zeros(2, 8, 8, device=DEVICE), draw(2, 8, 12)
    ops = torch.ops.shampoo_kernels
    try:
        import expecttest  # noqa: F401  (opcheck imports it)
    except ImportError:
        print("  without expecttest there is no opcheck")
    else:
        torch.library.opcheck(ops.gram_ema_.default, (stat, grad, 0.5, 1.0), {"side": "left"})
        options = {"method": "newton"}
        torch.library.opcheck(ops.inverse_root.default, (spectrum(8, 10.0), 2.0), options)
        torch.library.opcheck(ops.precondition.default, (grad, spectrum(8, 10.0), None))
        torch.library.opcheck(ops.eigenvalue_bound.default, (spectrum(8, 10.0),))
        torch.library.opcheck(ops.power_iteration.default, (spectrum(8, 10.0), 2, 4))

    @torch.compile(fullgraph=True, backend=COMPILER)
    def step(stat: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        gram_ema_(stat, grad, 0.5, 1.0, side="left")
        root = inverse_root(stat, 2, method="newton").root
        return precondition(grad, root, None)[0] * 2

    result = step(stat, grad)
    root = inverse_root(stat, 2, method="newton").root
    torch.testing.assert_close(result, 2 * precondition(grad, root, None)[0])


def check_workspace() -> None:
    """A refresh of a large stack needs at most four stacks beside its result."""
    n, blocks = SIZES["workspace"]
    A = spectrum(n, 1e3, blocks=1).repeat(blocks, 1, 1)
    for method, precision in (("newton", "highest"), ("product", "high")):
        inverse_root(A[:1], 2, ridge=1e-3, method=method, precision=precision)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        inverse_root(A, 2, ridge=1e-3, method=method, precision=precision)
        extra = (torch.cuda.max_memory_allocated() - before) / A.nbytes - 1
        print(f"  {method}, {precision}: {extra:.2f} stacks beside the result")
        assert extra <= 4


SMALL: dict[str, Callable[[], None]] = {
    "gram": check_gram,
    "bound": check_bound,
    "power iteration": check_power_iteration,
    "tiny and huge": check_tiny_and_huge,
    "power step, precondition": check_power_step_and_precondition,
    **{
        f"root {method} p={p} {word}": functools.partial(check_root, method, p, word)
        for method, p, word in ROOTS
    },
}
LARGE: dict[str, Callable[[], None]] = {
    "race": check_race,
    "64-bit offsets": check_wide_offsets,
    "own graphs": check_own_graphs,
    "no synchronisation, graphs": check_no_synchronisation_and_graphs,
    "torch.library": check_torch_library,
    "workspace": check_workspace,
}


def checks(small: bool = False) -> dict[str, Callable[[], None]]:
    """{name: function that raises where something does not hold}: Triton's kernels, and CUDA C++'s
    where they are built."""
    named: dict[str, Callable[[], None]] = {
        f"row {row.op} {row.form} {row.block} {mode}": functools.partial(check_row, row, mode)
        for row, mode in rows()
    }
    if reason := gpu_checks_native.why_not():
        print(f"CUDA C++ is left out: {reason}", file=sys.stderr)
        return SMALL if small else named | SMALL | LARGE
    own = gpu_checks_native.SMALL | ({} if small else gpu_checks_native.LARGE)
    return (SMALL if small else named | SMALL | LARGE) | own


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
