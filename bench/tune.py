"""Measure the tiles of the product kernel on this GPU, for developers:

    python bench/tune.py [--seconds 1200] [--results bench/results/<name of the GPU>]

writes shampoo_kernels/kernels/tuned.py, whose rows table.py takes first, and tune.json with every
time behind them. Candidates run by turns, as in gpu_timing.py, over inputs that are rotated past
the L2; a candidate whose error against float64 is larger than its arithmetic allows is left out.
"""

import argparse
import datetime
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from shampoo_kernels.kernels import table, tuned

TUNED = Path(tuned.__file__)
BLOCKS, BLOCK_KS, WARPS, STAGES = (32, 64, 128), (32, 64), (4, 8), (2, 3, 4)
SPLITS = (0, 512, 1024, 2048)
LARGE = 1 << 31


class Point(NamedTuple):
    """A call to choose tiles for: `batch` outputs n x n, sums over k; it stands for all calls
    of at most that n and k, the last of an op for all larger ones too."""

    op: str
    mode: str
    batch: int
    n: int
    k: int


class Timing(NamedTuple):
    row: table.Row
    milliseconds: float
    error: float  # relative, Frobenius, against float64


def points(modes: dict[str, tuple[str, ...]]) -> list[Point]:
    """Blocks in stacks, one large block, and for Gram products a sum much longer than n."""
    shapes = [(64, 256, 256), (16, 1024, 1024), (4, 2048, 2048), (1, 4096, 4096), (1, 8192, 8192)]
    long = [(1, 256, 8192), (1, 1024, 16384)]
    return [
        Point(op, mode, *shape)
        for op, served in modes.items()
        for mode in served
        for shape in [*shapes, *(long if op == "gram_ema_" else [])]
    ]


def modes(target: str) -> dict[str, tuple[str, ...]]:
    """{op: modes} that the table has rows for on this target."""
    found: dict[str, list[str]] = {}
    for row in table.ROWS:
        if row.target == target:
            known = found.setdefault(row.op, [])
            known += [mode for mode in row.modes if mode != "ieee" and mode not in known]
    return {op: tuple(names) for op, names in found.items()}


def candidates(target: str, point: Point) -> Iterator[table.Row]:
    """Every row that fits into the target's shared memory and gives each warp 256 results."""
    forms = ("descriptor", "pointer") if target == "sm_90" else ("pointer",)
    for form, block, block_k, warps, stages, split in itertools.product(
        forms, BLOCKS, BLOCK_KS, WARPS, STAGES, SPLITS
    ):
        if split and (point.op != "gram_ema_" or point.k < 2 * split):
            continue
        row = table.Row(target, point.op, (point.mode,), point.n, form, block, block_k, warps,
                        stages, k=point.k, split=split)  # fmt: skip
        if split and table.splits(row, point.batch, point.n, point.k) == 1:
            continue  # the same call as without
        fits = table.shared_bytes(row, point.mode) <= table.SHARED[target]
        if fits and block * block >= 256 * warps:
            yield row


def best(timings: list[Timing], allowed: float) -> Timing | None:
    """The fastest whose error is allowed; of those within 2 %, the one with the fewest resources,
    so that noise does not choose between equals."""
    right = [t for t in timings if t.error <= allowed]
    if not right:
        return None
    least = min(t.milliseconds for t in right)
    equals = [t for t in right if t.milliseconds <= 1.02 * least]
    return min(equals, key=lambda t: (table.shared_bytes(t.row, t.row.modes[0]), t.row.warps,
                                      t.row.split, t.milliseconds))  # fmt: skip


def rows(chosen: dict[Point, Timing], source: str) -> list[table.Row]:
    """Rows in the order in which table.select shall meet them: by n, then k, the last of each n
    open in k and the last n open too; a descriptor's row is followed by what other strides take,
    the derived rows of table.py."""
    result = []
    for _, group in itertools.groupby(sorted(chosen, key=_place), key=lambda p: (p.op, p.mode)):
        members = list(group)
        largest = members[-1].n
        for point, after in itertools.zip_longest(members, members[1:]):
            n = LARGE if point.n == largest else point.n
            k = LARGE if after is None or after.n != point.n else point.k
            timing = chosen[point]
            said = f"{source}: {timing.milliseconds:.4g} ms for {point.batch} x {point.n}², "
            result.append(timing.row._replace(n=n, k=k, chosen=f"{said}k = {point.k}"))
    return result


def _place(point: Point) -> tuple:
    return point.op, point.mode, point.n, point.k


def write(rows: list[table.Row], gpu: str, versions: str, date: str, path: Path) -> None:
    """tuned.py, with the rows of other targets that it already held."""
    namespace: dict = {}
    if path.exists():
        exec(path.read_text(), namespace)
    targets = {row.target for row in rows}
    kept = [row for row in namespace.get("ROWS", ()) if row[0] not in targets]
    lines = [
        f'"""Measured rows of table.py, written by bench/tune.py: {gpu}, {date}, {versions}."""',
        "",
        "# fmt: off",
        "ROWS: tuple[tuple, ...] = (",
        *(f"    {tuple(row)!r},  # noqa: E501" for row in (*kept, *rows)),
        ")",
    ]
    path.write_text("\n".join(lines) + "\n")


def tune(
    target: str,
    todo: list[Point],
    measure: Callable[[Point, list[table.Row]], list[Timing]],
    allowed: Callable[[Point], float],
    deadline: float,
) -> tuple[dict[Point, Timing], dict[Point, list[Timing]]]:
    """{point: choice}, {point: all timings}; points that no time is left for are left out."""
    chosen, everything = {}, {}
    for point in todo:
        if time.monotonic() > deadline:
            print(f"out of time: {point} keeps what it has", file=sys.stderr)
            continue
        everything[point] = measure(point, list(candidates(target, point)))
        found = best(everything[point], allowed(point))
        if found is None:
            print(f"nothing is right for {point}: it keeps what it has", file=sys.stderr)
        else:
            chosen[point] = found
            print(f"{point}: {found.milliseconds:.4g} ms with {found.row}")
    return chosen, everything


def on_the_gpu(point: Point, rows: list[table.Row]) -> list[Timing]:
    """Each candidate over the same rotated inputs, by turns, medians; those that fail, left out."""
    import gpu_matrices
    import gpu_timing as timing

    dtype = gpu_matrices.BFLOAT16 if point.mode == "16-bit" else gpu_matrices.FLOAT32
    if point.mode == "16-bit" and point.op == "product":
        dtype = gpu_matrices.FLOAT16
    batch, n, k = point.batch, point.n, point.k
    count = timing.copies(batch * n * (k * dtype.itemsize + 4 * n))
    A = [gpu_matrices.draw(batch, n, k, seed=seed, dtype=dtype) for seed in count]
    columns = min(n, 16) if point.op == "power_iteration" else n
    D = [gpu_matrices.draw(batch, n, columns, seed=seed) for seed in count]
    names = {str(index): row for index, row in enumerate(rows)}
    calls = {
        name: [
            lambda a=a, d=d, row=row: launch(point, row, a, d) for a, d in zip(A, D, strict=True)
        ]
        for name, row in names.items()
    }
    times = timing.milliseconds(calls, rounds=9)
    exact = A[0][:1].double() @ A[0][:1, :columns].double().mT
    found = []
    for name, row in names.items():
        if (value := times[name]) is not None:
            D[0].zero_()
            launch(point, row, A[0], D[0])
            error = gpu_matrices.relative(D[0][:1], 0.05 * exact).max().item()
            found.append(Timing(row, value, error))
    return found


def launch(point: Point, row: table.Row, A: torch.Tensor, D: torch.Tensor) -> None:
    """What the op does with its products: Gram products in place and by half, and so on."""
    from shampoo_kernels.kernels import gram_ema
    from shampoo_kernels.kernels.product import product

    original = table.select
    table.select = lambda *_: row  # type: ignore[assignment]
    try:
        if point.op == "gram_ema_":
            gram_ema.accumulate_(D, A[:, None], None, 0.95, 0.05, point.mode)
        else:
            B = A[:, : D.shape[-1]].mT
            product(A, B, D, op=point.op, c=0.05, symmetric=point.op == "newton",
                    precision=point.mode)  # fmt: skip
    finally:
        table.select = original


def error_of(point: Point) -> float:
    """Relative error that the mode's operands and a float32 sum of k products may make."""
    import gpu_matrices

    return 4 * gpu_matrices.UNITS[point.mode] + 16 * point.k**0.5 * 2.0**-23


def main(argv: list[str]) -> int:
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing was tuned", file=sys.stderr)
        return 1
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    name = torch.cuda.get_device_name()
    folder = "bench/results/" + name.lower().replace(" ", "-").replace("/", "-")
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--results", default=folder)
    options = parser.parse_args(argv)
    import gpu_timing as timing

    timing.DEADLINE = deadline = time.monotonic() + options.seconds
    target = table.target(torch.device("cuda", torch.cuda.current_device()))
    date = datetime.date.today().isoformat()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    chosen, everything = tune(target, points(modes(target)), on_the_gpu, error_of, deadline)
    os.makedirs(options.results, exist_ok=True)
    file = Path(options.results) / "tune.json"
    file.write_text(json.dumps({
        "gpu": name, "date": date, "versions": versions,
        "points": [[p._asdict(), [(*t.row, t.milliseconds, t.error) for t in timings]]
                   for p, timings in everything.items()],
    }, indent=1))  # fmt: skip
    write(rows(chosen, f"{options.results}/tune.json, {name}, {date}"), name, versions, date, TUNED)
    print(f"{len(chosen)} points chosen; wrote {TUNED} and {file}: run the tests, then commit both")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
