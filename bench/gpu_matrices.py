"""What the checks and benchmarks on a GPU share: matrices, the truth about them in float64, and the
proof that nothing waits for the device."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from shampoo_kernels import eigenvalue_bound

# tests/dry.py replaces it: all of this runs on a CPU too.
DEVICE = "cuda"
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# Largest relative error of one product of float32 operands in each mode; those of bfloat16 and
# float16 tensors are exact. tf32 may truncate: 2^-10 an operand.
UNITS = {"16-bit": 0.0, "ieee": 0.0, "tf32x3": 2.0**-19, "bf16x6": 2.0**-19, "bf16x3": 2.0**-14,
         "tf32": 2.0**-9, "bf16": 2.0**-7}  # fmt: skip


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = FLOAT32) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def integers(*shape: int, largest: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator, device=DEVICE)


def poisoned(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    return torch.full(shape, math.nan, device=DEVICE, dtype=dtype)


def relative(X: Tensor, Y: Tensor) -> Tensor:
    return (X.double() - Y.double()).norm(dim=(-2, -1)) / Y.double().norm(dim=(-2, -1))


def spectrum(n: int, kappa: float, blocks: int = 2) -> Tensor:
    Q = torch.linalg.qr(draw(blocks, n, n).double()).Q
    values = torch.logspace(0, -math.log10(kappa), n, dtype=torch.float64, device=DEVICE)
    A = (Q * values) @ Q.mT
    return ((A + A.mT) / 2).float()


def truth(A: Tensor, p: int, ridge: float) -> Tensor:
    values, vectors = torch.linalg.eigh(A.double())
    shifted = values.clamp(min=0) + ridge * eigenvalue_bound(A).double()[..., None]
    return (vectors * shifted.pow(-1 / p)[..., None, :]) @ vectors.mT


def without_waiting(function: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Clones of what it returns; to wait for the device on the way is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        return [x.clone() for x in function()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
