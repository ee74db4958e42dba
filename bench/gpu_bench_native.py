"""Timings of the CUDA C++ kernels on a GPU: rows of gpu_bench.py, in the same run and table."""

import math
from collections.abc import Callable

import torch
from cases import GPT2, LLAMA_1B, Shape
from gpu_bench_roots import eigensolvers, meta_newton
from gpu_checks_native import small_root, why_not
from gpu_matrices import relative, spectrum, truth
from gpu_timing import BFLOAT16, copies, eager, milliseconds, under

from shampoo_kernels import inverse_root, orthogonal_iteration, power_iteration, use_backend
from shampoo_kernels.ops.moments import Entry, Rule, moments_
from shampoo_kernels.ops.pack import Pieces

BLOCK = 1024
MODELS = {"GPT-2 124M": GPT2, "Llama 1B": LLAMA_1B}
DEVICE = "cuda"


def bench_small_root(batch: int, n: int, p: int, ridge: float, rate: dict[str, float]) -> dict:
    """Against eigensolvers, plain coupled Newton by bmm, and our own schedule by bmm."""
    rotated = [spectrum(n, 1 / ridge, blocks=8).repeat(batch // 8, 1, 1)
               for _ in copies(4 * batch * n * n)]  # fmt: skip
    A, exact = rotated[0], truth(rotated[0][:8], p, ridge)
    forms = {"ffma": False, "tf32x3": True}
    variants: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        name: lambda a, form=form: small_root(a, p, ridge, form)[0] for name, form in forms.items()
    }
    variants["same schedule, bmm"] = lambda a: under(  # type: ignore[assignment,return-value]
        "reference", lambda: inverse_root(a, p, ridge=ridge, method="newton").root
    )()
    variants["coupled Newton, bmm"] = lambda a: meta_newton(a, p, ridge)
    calls = {
        name: [lambda a=a, call=call: call(a) for a in rotated] for name, call in variants.items()
    }
    calls |= {name: [call] for name, call in eigensolvers(A).items()}
    found = milliseconds(calls, rounds=6)
    errors = {name: relative(call(A)[:8], exact).max().item() for name, call in variants.items()}
    ours = min(forms, key=lambda name: found[name] or math.inf)
    return {
        "case": f"inverse_root, one launch ({ours}), {batch} x {n}², p = {p}, ridge {ridge:g}",
        "milliseconds": {"ours": found.pop(ours), **found},
        "floor": None,
        "error": errors.pop(ours),
        "errors": errors,
    }


def blocks(matrix: torch.Tensor) -> list[torch.Tensor]:
    return [piece for rows in matrix.split(BLOCK) for piece in rows.split(BLOCK, dim=1)]


def bench_pack(
    name: str, shapes: list[Shape], dtype: torch.dtype, apply: bool,
    rate: dict[str, float],
) -> dict:  # fmt: skip
    """Share of the copy bandwidth; against a copy per block and torch._foreach_copy_."""
    data = [piece for m, n in shapes
            for piece in blocks(torch.randn(m, n, device=DEVICE).to(dtype))]  # fmt: skip
    stacks = [torch.randn(1, *x.shape, device=DEVICE) for x in data]
    pieces, packed = Pieces(data, stacks), [stack[0] for stack in stacks]
    decay = torch.full((len(data),), 0.999, device=DEVICE)
    step = torch.full((len(data),), -1e-3, device=DEVICE)

    def each() -> None:
        for x, p in zip(data, packed, strict=True):
            x.mul_(0.999).add_(p, alpha=-1e-3) if apply else p.copy_(x)

    def foreach() -> None:
        if apply:
            torch._foreach_mul_(data, 0.999)
            torch._foreach_add_(data, [p.to(dtype) for p in packed], alpha=-1e-3)
        else:
            torch._foreach_copy_(packed, data)

    ours = (lambda: pieces.apply_(decay, step)) if apply else pieces.pack_
    pieces.table  # noqa: B018  (made once, outside of what is timed)
    found = milliseconds({
        "ours": [under("native", ours)], "per block": [each], "torch._foreach": [foreach],
    })  # fmt: skip
    size = dtype.itemsize
    moved = sum(x.numel() for x in data) * (2 * size + 4 if apply else size + 4)
    what = "unpack_apply" if apply else "pack"
    return {
        "case": f"{what} {name}, {len(data)} pieces, {str(dtype).removeprefix('torch.')}",
        "milliseconds": found,
        "floor": moved / rate["copy GB/s"] / 1e6,
        "error": 0.0,
    }


def bench_moments(name: str, shapes: list[tuple[int, int]], rate: dict[str, float]) -> dict:
    """Share of the copy bandwidth, the table of pointers included; against torch._foreach."""
    exp_avgs, exp_avg_sqs, grads = (
        [piece for m, n in shapes for piece in blocks(torch.rand(m, n, device=DEVICE))]
        for _ in range(3)
    )
    grads = [grad.contiguous() for grad in grads]
    entries = [
        Entry([m], [v], grad[None], True)
        for m, v, grad in zip(exp_avgs, exp_avg_sqs, grads, strict=True)
    ]
    ones = torch.ones(len(entries), device=DEVICE)
    rule = Rule((0.9, 0.95), 1e-8, "adam", False)

    def foreach() -> object:
        torch._foreach_lerp_(exp_avgs, grads, 0.1)
        torch._foreach_mul_(exp_avg_sqs, 0.95)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 0.05)
        roots = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_add_(roots, 1e-8)
        own = torch._foreach_div(exp_avgs, roots)
        return own, torch._foreach_norm(own)

    found = milliseconds({
        "ours": [under("native", lambda: moments_(entries, ones, ones, rule))],
        "torch._foreach": [foreach],
    })  # fmt: skip
    with use_backend("native"):
        (own,) = moments_(entries[-1:], ones[-1:], ones[-1:], rule).own
    eps = 1e-8 * (1 - 0.95) ** 0.5
    exact = exp_avgs[-1].double() / (exp_avg_sqs[-1].double().sqrt() + eps)
    numbers = sum(grad.numel() for grad in grads)
    moved = 7 * 4 * numbers  # both averages read and written, G read, momentum and step written
    return {
        "case": f"moments {name}, {len(entries)} pieces, float32",
        "milliseconds": found,
        "floor": moved / rate["copy GB/s"] / 1e6,
        "error": relative(own, exact[None]).max().item(),
    }


def bench_power(batch: int, n: int, rate: dict[str, float]) -> dict:
    A = [spectrum(n, 1e3, blocks=4).repeat(batch // 4, 1, 1) for _ in copies(4 * batch * n * n)]
    calls = [lambda a=a: power_iteration(a) for a in A]
    found = milliseconds({
        "ours": [under("native", call) for call in calls],
        "torch": [under("reference", call) for call in calls],
    })  # fmt: skip
    exact = torch.linalg.eigvalsh(A[0][:4].double())[:, -1]
    estimate = under("native", calls[0])()
    error = (1 - estimate[:4].double() / exact).max().item()  # type: ignore[index]
    return {"case": f"power_iteration {batch} x {n}², 10 steps", "milliseconds": found,
            "floor": None, "error": error}  # fmt: skip


def bench_basis(batch: int, n: int, rate: dict[str, float]) -> dict:
    A = spectrum(n, 1e3, blocks=4).repeat(batch // 4, 1, 1)
    Q = torch.linalg.qr(torch.randn_like(A)).Q
    call = lambda: orthogonal_iteration(A, Q)  # noqa: E731
    found = milliseconds({
        "ours": [under("native", call)], "torch": [eager(under("reference", call))],
    })  # fmt: skip
    new = under("native", call)()[1]  # type: ignore[index]
    error = (new.mT @ new - torch.eye(n, device=DEVICE)).abs().max().item()
    return {"case": f"orthogonal_iteration {batch} x {n}²", "milliseconds": found,
            "floor": None, "error": error}  # fmt: skip


def jobs() -> list[tuple[Callable[..., dict], tuple]]:
    if why_not():
        return []
    roots = [(4096, 32), (4096, 64), (1024, 128)]
    models = [(name, [s for s in shapes if len(s) == 2]) for name, shapes in MODELS.items()]
    return [
        *((bench_small_root, (batch, n, 2, 1e-6)) for batch, n in roots),
        *((bench_pack, (name, shapes, BFLOAT16, apply))
          for name, shapes in models for apply in (False, True)),
        *((bench_moments, model) for model in models),
        *((bench_power, size) for size in ((1024, 128), (64, 1024))),
        *((bench_basis, size) for size in ((4096, 32), (1024, 128))),
    ]  # fmt: skip
