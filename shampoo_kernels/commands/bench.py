"""python -m shampoo_kernels bench: every op on every backend that is here, in half a minute.

Only torch is needed. `make bench` in a checkout measures more, against other packages.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

import shampoo_kernels
from shampoo_kernels import chooser, native, use_backend
from shampoo_kernels.commands._bench_cases import OPS, Case, stacks
from shampoo_kernels.commands._timing import Times, in_turn

ACCEPTED = 0.01  # a backend with a larger error is not preferred, however fast


class Row(NamedTuple):
    """One case: what every backend took, and its error, or why it has none."""

    op: str
    size: str
    times: Mapping[str, Times]
    errors: Mapping[str, float]
    failed: Mapping[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long (default 30)")
    parser.add_argument(
        "--largest", type=int, default=1024, help="the largest block (default 1024)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")


def run(args: argparse.Namespace) -> int:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if (why := _wrong(args, device)) is not None:
        print(f"bench: {why}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    names = {op: candidates(op, device) for op in OPS}
    several = [op for op in OPS if len(names[op]) > 1]
    print(_where(device))
    cases = len(several) * len(stacks(args.largest))
    rows: list[Row] = []
    for op in several:
        for stack in stacks(args.largest):
            row = measure(OPS[op](*stack, device), names[op], args.seconds / max(cases, 1))
            print(line(row), flush=True)
            rows.append(row)
    print()
    for op in several:
        print(verdict([row for row in rows if row.op == op], _in_use(op, device)))
    for op in OPS:
        if op not in several:
            print(f"{op}: only the reference is here: {_why_only_reference(op, device)}")
    return 0


def _wrong(args: argparse.Namespace, device: str) -> str | None:
    if not 0 < args.seconds < math.inf:
        return f"--seconds must be positive, got {args.seconds}"
    if args.largest < 2:
        return f"--largest must be at least 2, got {args.largest}"
    if device not in ("cpu", "cuda"):
        return f"--device must be cpu or cuda, got {device}"
    if device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: there is none"
    return None


def candidates(op: str, device: str) -> list[str]:
    """The backends that serve float32 of this op here, the reference last."""
    rows = [r for r in chooser.TABLE if (r.op, r.device) == (op, device)]
    here = [r.backend for r in rows if torch.float32 in r.dtypes and chooser.why_absent(r) is None]
    return [*dict.fromkeys(here), "reference"]


def _in_use(op: str, device: str) -> str:
    return chooser.choose(op, device, torch.float32)


def _why_only_reference(op: str, device: str) -> str:
    for row in chooser.TABLE:
        if (row.op, row.device) == (op, device) and (why := chooser.why_absent(row)) is not None:
            return str(why)
    return "no other kernel of this op yet"


def _where(device: str) -> str:
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"CPU, {native.isa() or 'no'} kernels"
    )
    return (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, shampoo_kernels "
        f"{shampoo_kernels.__version__}. Medians in ms ± the interquartile range, errors against "
        "float64."
    )


def measure(case: Case, names: Sequence[str], budget: float) -> Row:
    """Time one case on every backend, in turn; a backend that raises is reported, not fatal."""
    functions, errors, failed = {}, {}, {}
    for name in names:

        def function(name: str = name) -> object:
            with use_backend(name):
                return case.call()

        try:
            errors[name] = float(case.error(function()))
            functions[name] = function
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
    wait = torch.cuda.synchronize if case.device == "cuda" else (lambda: None)
    times = in_turn(functions, budget, most=100, wait=wait) if functions else {}
    return Row(case.op, case.size, times, errors, failed)


def preferred(row: Row) -> str | None:
    """The fastest accepted backend; of those whose quartiles overlap with its, the most accurate.
    None where none is accepted."""
    good = [name for name in row.times if row.errors[name] <= ACCEPTED]
    if not good:
        return None
    fastest = min(good, key=lambda name: row.times[name].median)
    level = [name for name in good if row.times[name].q1 <= row.times[fastest].q3]
    return min(level, key=lambda name: (row.errors[name], row.times[name].median))


def line(row: Row) -> str:
    cells = []
    for name, t in row.times.items():
        spread = 100 * (t.q3 - t.q1) / t.median
        cells.append(f"{name} {1e3 * t.median:.3g} ± {spread:.0f} % ({row.errors[name]:.0e})")
    cells += [f"{name} fails: {why}" for name, why in row.failed.items()]
    return f"{row.op:<21} {row.size:<16} " + "  ".join(f"{cell:<32}" for cell in cells).rstrip()


def verdict(rows: Sequence[Row], in_use: str) -> str:
    """Which backend to prefer for one op: by size where that differs, and how much it saves."""
    op, choices = rows[0].op, [preferred(row) for row in rows]
    names = list(dict.fromkeys(name for name in choices if name is not None))
    if not names:
        return f"{op}: no backend is accurate here; in use: {in_use}"
    if len(names) == 1 and None not in choices:
        ratio = gain(rows, names[0])
        more = "" if ratio is None else f", {ratio:.1f} times as fast (geometric mean)"
        text = f"prefer {names[0]}{more}"
    else:
        sizes = zip(rows, choices, strict=True)
        text = "prefer " + ", ".join(f"{name or 'none'} for {row.size}" for row, name in sizes)
    others = set(names) - {in_use}
    hint = f"; use_backend({names[0]!r}) asks for it" if others and len(names) == 1 else ""
    return f"{op}: {text}; in use: {in_use}{hint}"


def gain(rows: Sequence[Row], name: str) -> float | None:
    """How many times faster than the best other backend, as a geometric mean; None without one."""
    logarithms = [
        math.log(min(t.median for other, t in row.times.items() if other != name))
        - math.log(row.times[name].median)
        for row in rows
        if len(row.times) > 1
    ]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None
