"""What has to hold on a GPU: plain functions, so that they run with pytest (tests/test_gpu.py) and,
where there is none, without: python bench/gpu_checks.py [--small] [--part i/k]

Truth is float64 on the same GPU. `--small` is for compute-sanitizer.
"""

import functools
import math
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
    precondition,
    use_backend,
)
from shampoo_kernels.kernels import table
from shampoo_kernels.kernels.product import product

DEVICE = "cuda"
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
                weight = draw(3, summed, summed, seed=2)
                weight = weight + weight.mT
                for W in (None, weight):
                    if W is not None and summed > 1000:
                        continue
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
    G = integers(1, 4096, 256, largest=1).to(BFLOAT16)
    once = (G.float() @ G.float().mT).round()
    stat = torch.zeros(1, 4096, 4096, device=DEVICE)
    for _ in range(100):
        gram_ema_(stat, G, 1.0, 1.0, side="left")
    assert torch.equal(stat, 100 * once)


def check_wide_offsets() -> None:
    """A stack of more than 2^31 elements: its last block is where it should be."""
    n, blocks = 8192, 33
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
    for n in (33, 128, 260):
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


def check_no_synchronisation_and_graphs() -> None:
    """Every op runs under torch's synchronisation check, is captured, and replays the same bits."""
    A, grad = spectrum(96, 1e3), draw(2, 96, 64, dtype=BFLOAT16)
    stat, previous = torch.zeros(2, 96, 96, device=DEVICE), spectrum(96, 10.0)

    def everything() -> list[torch.Tensor]:
        gram_ema_(stat, grad, 0.0, 1.0, side="left")
        newton = inverse_root(A, 2, method="newton", previous=previous)
        other = inverse_root(A, 4, ridge=1e-3, method="product", precision="high")
        return [stat, *newton, *other, *precondition(grad, newton.root, None)]

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
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = everything()
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

    @torch.compile(fullgraph=True)
    def step(stat: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        gram_ema_(stat, grad, 0.5, 1.0, side="left")
        root = inverse_root(stat, 2, method="newton").root
        return precondition(grad, root, None)[0] * 2

    result = step(stat, grad)
    root = inverse_root(stat, 2, method="newton").root
    torch.testing.assert_close(result, 2 * precondition(grad, root, None)[0])


def check_workspace() -> None:
    """A refresh of a large stack needs at most four stacks beside its result."""
    A = spectrum(512, 1e3, blocks=1).repeat(160, 1, 1)
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
    "power step, precondition": check_power_step_and_precondition,
    **{
        f"root {method} p={p} {word}": functools.partial(check_root, method, p, word)
        for method, p, word in ROOTS
    },
}
LARGE: dict[str, Callable[[], None]] = {
    "race": check_race,
    "64-bit offsets": check_wide_offsets,
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
    with use_backend("triton"):
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
