"""The symmetric products of quack and the orthogonalisation of gram-newton-schulz, where they are
installed: rows of gpu_bench.py. Written against quack-kernels 0.6.5 and gram-newton-schulz 0.1.6;
neither has run beside these kernels yet."""

import importlib.util
from collections.abc import Callable

import gpu_timing as timing
import torch
from gpu_matrices import relative
from gpu_timing import BFLOAT16, FLOAT32, Calls, copies, eager, milliseconds

from shampoo_kernels import gram_ema_, orthogonalize

SIZES = [(1, 2048), (1, 4096), (1, 8192), (64, 512), (64, 1024)]
RECTANGLES = [(16, 1024, 4096), (48, 768, 3072), (64, 512, 512)]


def bench_symmetric(batch: int, n: int, rate: dict[str, float]) -> dict:
    """A bfloat16 Gram matrix into float32, in one call and as a product that is added."""
    from quack.gemm_interface import gemm_symmetric

    G = [torch.randn(batch, n, n, device=timing.DEVICE).to(BFLOAT16)
         for _ in copies(6 * batch * n * n)]  # fmt: skip
    S = [torch.zeros(batch, n, n, device=timing.DEVICE) for _ in G]

    def each(call: Callable[[torch.Tensor, torch.Tensor], object]) -> Calls:
        return [lambda s=s, g=g: call(s, g) for s, g in zip(S, G, strict=True)]

    def added_(s: torch.Tensor, g: torch.Tensor) -> None:
        s.mul_(0.95).add_(gemm_symmetric(g, g.mT, out_dtype=FLOAT32), alpha=0.05)

    found = milliseconds({
        "ours": each(lambda s, g: gram_ema_(s, g, 0.95, 0.05, side="left")),
        "quack, C and out in float32": each(
            lambda s, g: gemm_symmetric(g, g.mT, C=s, out=s, alpha=0.05, beta=0.95)
        ),
        "quack into float32, mul, add": each(added_),
        "quack in bfloat16, the product alone": each(lambda s, g: gemm_symmetric(g, g.mT)),
    })  # fmt: skip
    exact = G[0][:1].double() @ G[0][:1].double().mT
    stat = gram_ema_(torch.zeros_like(S[0]), G[0], 0.0, 1.0, side="left")
    theirs = gemm_symmetric(G[0], G[0].mT)
    return {
        "case": f"gram_ema_ {batch} x {n}², bfloat16, and quack",
        "milliseconds": found,
        "floor": batch * n * n * (n + 128.0) / rate["bf16 TFLOP/s"] / 1e9,
        "error": relative(stat[:1], exact).max().item(),
        "errors": {"quack in bfloat16": relative(theirs[:1], exact).max().item()},
    }


def bench_orthogonalize(batch: int, m: int, n: int, rate: dict[str, float]) -> dict:
    """The same polynomials; errors against them in float64. Theirs computes in float16, restarts
    after the second step, and is compiled by no one here: CUDA graphs take its launches too."""
    import gram_newton_schulz as peer

    G = torch.randn(batch, m, n, device=timing.DEVICE).to(BFLOAT16)
    steps = [tuple(step) for step in peer.POLAR_EXPRESS_COEFFICIENTS]
    forms = {
        "gram-newton-schulz, quack": peer.GramNewtonSchulz(compile_kwargs=None),
        "gram-newton-schulz, torch": peer.GramNewtonSchulz(
            ns_use_kernels=False, compile_kwargs=None
        ),
        "its standard form, quack": peer.StandardNewtonSchulz(compile_kwargs=None),
    }
    variants: dict[str, Callable[[], object]] = {
        "ours": lambda: orthogonalize(G, coefficients=steps)
    }
    variants |= {name: lambda form=form: form(G) for name, form in forms.items()}
    variants["polar factor by SVD"] = eager(
        lambda: torch.linalg.svd(G.float(), full_matrices=False)
    )
    found = milliseconds({name: [call] for name, call in variants.items()}, rounds=5)
    exact = orthogonalize(G[:1].double(), coefficients=steps)
    errors = {
        name: relative(variants[name]()[:1], exact).max().item()  # type: ignore[index]
        for name in ("ours", *forms)
        if found[name] is not None
    }
    return {"case": f"orthogonalize {batch} x {m} x {n}, {len(steps)} steps", "milliseconds": found,
            "floor": None, "error": errors.pop("ours"), "errors": errors}  # fmt: skip


def jobs() -> list[tuple[Callable[..., dict], tuple]]:
    found: list[tuple[Callable[..., dict], tuple]] = []
    if importlib.util.find_spec("quack"):
        found += [(bench_symmetric, size) for size in SIZES]
    if importlib.util.find_spec("gram_newton_schulz"):
        found += [(bench_orthogonalize, size) for size in RECTANGLES]
    return found
