"""What has to hold of the CUDA C++ on pieces of many tensors; gpu_checks_native.py runs these."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from shampoo_kernels import use_backend
from shampoo_kernels.ops.moments import Entry, Rule, moments_
from shampoo_kernels.ops.pack import Pieces

DEVICE = "cuda"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SICK = (math.nan, math.inf, None, -math.inf)  # by what a block is not finite; None: it is


@contextlib.contextmanager
def natively() -> Iterator[None]:
    """The native kernels, with an error where something waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with use_backend("native"):
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def shape(k: int) -> tuple[int, int]:
    """Small blocks, of which the columns are and are not multiples of four, and some of several
    chunks."""
    return (2 + k % 3, 5000 + k) if k % 50 == 49 else (1 + k % 37, 4 * (1 + k % 23) + (k % 3 == 0))


def layout(x: Tensor, k: int) -> Tensor:
    """x (m, n) contiguous, transposed, or inside of a larger matrix."""
    if k % 3 == 1:
        return x.mT.contiguous().mT
    if k % 3 == 2:
        frame = torch.full((x.shape[0] + 2, x.shape[1] + 3), math.nan, device=DEVICE, dtype=x.dtype)
        frame[1:-1, 2:-1] = x
        return frame[1:-1, 2:-1]
    return x.clone()


def check_pack_finite(count: int) -> None:
    """Every dtype and stride: what is finite is packed, the rest is 0, and no other; norms."""
    data, stacks, finite = [], [], []
    for k in range(count):
        for _ in range(1 + k % 3):
            x = layout(torch.randn(shape(k), device=DEVICE).to(FLOATS[k % 4]), k)
            sick = SICK[len(data) % 4]
            if sick is not None:
                x[-1, -1] = sick
            data.append(x)
            finite.append(sick is None)
        stacks.append(torch.empty(1 + k % 3, *shape(k), device=DEVICE, dtype=FLOATS[k // 2 % 4]))
    before = [x.clone() for x in data]
    with natively():
        squares = Pieces(data, stacks).pack_finite_(negate=True)
        again = Pieces(data, stacks).pack_finite_(negate=True)
    assert squares.isfinite().tolist() == finite
    assert torch.equal(squares.nan_to_num(), again.nan_to_num())
    packed = [place for stack in stacks for place in stack]
    for x, old, place, square, good in zip(data, before, packed, squares, finite, strict=True):
        assert torch.equal(x.nan_to_num(7.0), old.nan_to_num(7.0))
        if good:
            through = -x.float() if place.dtype.itemsize == 2 else -x
            assert torch.equal(place, through.to(place.dtype))
            exact = x.double().square().sum()
            assert (square - exact).abs() <= 2 * (x.numel() + 4) * 2.0**-53 * exact
        else:
            assert not place.any()


def check_moments(count: int, dtype: torch.dtype) -> None:
    """Against the reference in float64: every average in a few units in the last place, where
    nothing cancels because all numbers are positive; blocks that stand still do, bit for bit."""
    random = lambda *size: torch.rand(size, device=DEVICE, dtype=torch.float64) + 0.1  # noqa: E731
    exact, entries, blocks = [], [], 0
    for k in range(count):
        b = 1 + k % 3
        grad = random(b, *shape(k)).to(dtype)
        pieces = [[layout(random(*shape(k)).to(dtype), k) for _ in range(b)] for _ in range(2)]
        entries.append(Entry(*pieces, grad, k % 4 != 3))
        copies = [[x.to(torch.float64, copy=True) for x in averages] for averages in pieces]
        exact.append(Entry(*copies, grad.double(), k % 4 != 3))
        blocks += b
    moves = (torch.arange(blocks, device=DEVICE) % 5 != 2).to(dtype)
    steps = (torch.arange(blocks, device=DEVICE) % 7).to(dtype)
    rule = Rule((0.9, 0.95), 1e-3, "adam", True)
    still = [
        (x, x.clone()) for x, moved in zip(_averages(entries), moves, strict=True) if not moved
    ]
    with natively():
        found = moments_(entries, moves, steps, rule)
    with use_backend("reference"):
        wanted = moments_(exact, moves.double(), steps.double(), rule)
    assert all(torch.equal(x, old) for x, old in still)
    most = 16 * torch.finfo(dtype).eps
    results = [*_averages(entries), *_squares(entries), *found.momenta, *found.own]
    truths = [*_averages(exact), *_squares(exact), *wanted.momenta, *wanted.own]
    for result, truth in zip(results, truths, strict=True):
        assert ((result.double() - truth).abs() <= most * truth).all()
    assert (
        (found.squared_norms - wanted.squared_norms).abs() <= 3 * most * wanted.squared_norms
    ).all()


def _averages(entries: list[Entry]) -> list[Tensor]:
    return [x for entry in entries for x in entry.exp_avgs]


def _squares(entries: list[Entry]) -> list[Tensor]:
    return [x for entry in entries for x in entry.exp_avg_sqs or ()]
