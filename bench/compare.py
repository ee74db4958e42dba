"""What got slower: python bench/compare.py BASE.json NEW.json

A row is slower when its interquartile range lies above that of the base and its median is more than
FLOOR above. The baselines of a row run in turn with ours, so when they are as much slower, it is
the machine. Ends with 1 when something is slower or less accurate, 2 when the runs cannot be
compared.
"""

import json
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

from page import op_of, seconds

FLOOR = 0.05  # two runs on a quiet machine differ by a few percent
WORSE_ERROR = 2.0


class Change(NamedTuple):
    """One row of both runs: seconds then and now; by how much its baselines changed, if any."""

    case: str
    base: float
    new: float
    beyond_noise: bool
    baselines: float | None

    @property
    def ratio(self) -> float:
        return self.new / self.base


def main(argv: list[str]) -> int:
    if len(argv) != 2 or not all(argv):
        print("usage: compare.py BASE.json NEW.json", file=sys.stderr)
        return 2
    runs = []
    for name in argv:
        try:
            runs.append(json.loads(Path(name).read_text()))
        except (OSError, ValueError) as error:
            print(f"compare: {name} cannot be read: {error}", file=sys.stderr)
            return 2
    base, new = runs
    if (why := different(base, new)) is not None:
        print(f"compare: {why}", file=sys.stderr)
        return 2
    lines, bad = report(base, new)
    print("\n".join(lines))
    return int(bad)


def machine_of(run: dict) -> dict:
    return run["machine_info"]["shampoo_kernels"]


def different(base: dict, new: dict) -> str | None:
    """Why two runs must not be compared, or None."""
    one, two = machine_of(base), machine_of(new)
    for key in ("cpu", "threads", "isa"):
        if one[key] != two[key]:
            return f"not the same machine: {key} is {one[key]!r} in the base, {two[key]!r} here"
    if one.get("quick", False) != two.get("quick", False):
        return "one run is QUICK=1, the other is not: their rows differ"
    return None


def changes(base: dict, new: dict) -> list[Change]:
    old, found = _rows(base), []
    for key, row in _rows(new).items():
        if key not in old:
            continue
        before, after = old[key]["stats"], row["stats"]
        apart = after["q1"] > before["q3"] or after["q3"] < before["q1"]
        ratio = after["median"] / before["median"]
        beyond = apart and not 1 / (1 + FLOOR) <= ratio <= 1 + FLOOR
        found.append(Change(": ".join(key), before["median"], after["median"], beyond,
                            _baselines(old[key], row)))  # fmt: skip
    return found


def _rows(run: dict) -> dict[tuple[str, str], dict]:
    return {(op_of(row), row["extra_info"]["case"]): row for row in run["benchmarks"]}


def _baselines(before: dict, after: dict) -> float | None:
    """The median ratio of the baselines that both rows have."""
    old, new = (row["extra_info"]["baselines"] for row in (before, after))
    ratios = [seconds(new[name]) / seconds(old[name]) for name in old if name in new]
    return median(ratios) if ratios else None


def less_accurate(base: dict, new: dict) -> list[str]:
    old, found = _rows(base), []
    for key, row in _rows(new).items():
        errors = [r["extra_info"]["errors"].get("ours") for r in (old.get(key, row), row)]
        failed = "ours" in row["extra_info"].get("failed", {})
        was = "ours" in old.get(key, row)["extra_info"].get("failed", {})
        if failed and not was:
            found.append(f"{': '.join(key)}: fails now, {row['extra_info']['failed']['ours']}")
        elif None not in errors and errors[1] > WORSE_ERROR * errors[0]:
            found.append(f"{': '.join(key)}: error {errors[0]:.1e} -> {errors[1]:.1e}")
    return found


def report(base: dict, new: dict) -> tuple[list[str], bool]:
    """Lines to print, and whether something got worse."""
    found = changes(base, new)
    slower = sorted((c for c in found if c.beyond_noise and c.ratio > 1), key=lambda c: -c.ratio)
    faster = [c for c in found if c.beyond_noise and c.ratio < 1]
    worse = less_accurate(base, new)
    one, two = machine_of(base), machine_of(new)
    lines = [f"{two['cpu']}, {two['threads']} threads; {_commit(base)} -> {_commit(new)}"]
    for key in ("torch", "python"):
        if one[key] != two[key]:
            lines.append(f"note: {key} {one[key]} -> {two[key]}")
    lines.append(
        f"{len(found)} rows in both runs: {len(slower)} slower beyond noise, {len(faster)} faster"
    )
    for c in slower:
        others = "" if c.baselines is None else f"; its baselines x{c.baselines:.2f}"
        lines.append(
            f"slower x{c.ratio:.2f}{others}: {c.case}: {1e3 * c.base:.3g} -> {1e3 * c.new:.3g} ms"
        )
    lines += [f"less accurate: {line}" for line in worse]
    gone, added = _rows(base).keys() - _rows(new).keys(), _rows(new).keys() - _rows(base).keys()
    lines += [f"only in the base: {': '.join(key)}" for key in sorted(gone)]
    lines += [f"only here: {': '.join(key)}" for key in sorted(added)]
    return lines, bool(slower or worse)


def _commit(run: dict) -> str:
    info = run.get("commit_info", {})
    return str(info.get("id") or "no commit")[:12] + " with changes" * bool(info.get("dirty"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
