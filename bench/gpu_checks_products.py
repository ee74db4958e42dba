"""What has to hold of the product kernel on a GPU, and of the ops that are products;
gpu_checks.py runs these, by name."""

import functools
import math
from collections.abc import Callable

import gpu_matrices
import torch
from gpu_matrices import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    UNITS,
    draw,
    integers,
    poisoned,
    relative,
    spectrum,
)

from shampoo_kernels import gram_ema_, kronecker_power_step, precondition, use_backend
from shampoo_kernels.kernels import table
from shampoo_kernels.kernels.product import product

RACE = (4096, 256, 100)  # n, k, repeats
WIDE_OFFSETS = (8192, 33)  # n, blocks: more than 2^31 elements


def rows() -> list[tuple[table.Row, str]]:
    """Every row of the table that serves this GPU, in each of its modes."""
    if not torch.cuda.is_available():
        return []
    here = table.target(torch.device(gpu_matrices.DEVICE, torch.cuda.current_device()))
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
    a, b, c = 0.5, 0.9, torch.tensor([-0.3, 0.0, 2.0], device=gpu_matrices.DEVICE)
    size = A.double().abs() @ B.double().abs()
    value = A.double() @ B.double() * c.double()[:, None, None] + 0.9 * C.double()
    value += 0.5 * torch.eye(n, device=gpu_matrices.DEVICE, dtype=torch.float64)
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
        distance = (D - torch.eye(n, device=gpu_matrices.DEVICE)).abs().amax((1, 2))
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
                    beta = torch.tensor([0.9, 0.0, 1.0], device=gpu_matrices.DEVICE)
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
    n, k, repeats = RACE
    G = integers(1, n, k, largest=1).to(BFLOAT16)
    once = (G.float() @ G.float().mT).round()
    stat = torch.zeros(1, n, n, device=gpu_matrices.DEVICE)
    for _ in range(repeats):
        gram_ema_(stat, G, 1.0, 1.0, side="left")
    assert torch.equal(stat, repeats * once)


def check_wide_offsets() -> None:
    """A stack of more than 2^31 elements: its last block is where it should be."""
    n, blocks = WIDE_OFFSETS
    if torch.cuda.mem_get_info()[0] < 2.5 * blocks * n * n * 2 + 6e9:
        return
    G = torch.zeros(blocks, n, n, device=gpu_matrices.DEVICE, dtype=BFLOAT16)
    G[-1, :, :64] = integers(n, 64, largest=2).to(BFLOAT16)
    stat = torch.zeros(1, n, n, device=gpu_matrices.DEVICE)
    gram_ema_(stat, G[-1:], 0.0, 1.0, side="left")
    part = G[-1, :, :64].float()
    assert torch.equal(stat[0], part @ part.mT)
    D = torch.empty(blocks, 64, 64, device=gpu_matrices.DEVICE)
    product(G[:, -64:], G[:, -64:].mT, D, op="gram_ema_", symmetric=True)
    assert torch.equal(D[-1], part[-64:] @ part[-64:].mT)


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


def every_row() -> dict[str, Callable[[], None]]:
    return {
        f"row {row.op} {row.form} {row.block} {mode}": functools.partial(check_row, row, mode)
        for row, mode in rows()
    }


SMALL: dict[str, Callable[[], None]] = {
    "gram": check_gram,
    "power step, precondition": check_power_step_and_precondition,
}
LARGE: dict[str, Callable[[], None]] = {"race": check_race, "64-bit offsets": check_wide_offsets}
