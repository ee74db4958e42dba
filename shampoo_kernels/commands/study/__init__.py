"""python -m shampoo_kernels study"""

import argparse
import csv
import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shampoo_kernels.commands import _data
from shampoo_kernels.commands.study import page, plots, runs, settings
from shampoo_kernels.commands.study.claims import claims
from shampoo_kernels.commands.study.settings import SEEDS, Setting
from shampoo_kernels.commands.study.verdicts import Claim

DESCRIPTION = """
Measures how close the Kronecker products that Shampoo, Shampoo², K-FAC and others use come to the
matrix they approximate, along the training of small networks, and what batch gradients and real
labels do to them: the claims of Morwani et al. (arXiv 2406.17748), each with what was found. Writes
a page (index.html), its pictures and its numbers as CSV into one folder. Runs that are finished are
kept there too: the same command goes on where it was stopped.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        default=Path("shampoo_kernels_study"),
        help="the folder of the page and all that belongs to it (default %(default)s)",
    )
    add(
        "--settings",
        nargs="+",
        choices=[setting.name for setting in settings.SETTINGS],
        help=f"run these alone (default: all whose data is there; MNIST and CIFAR-10 are read from "
        f"the folder in the environment variable {_data.FOLDER})",
    )
    add("--seeds", type=int, default=SEEDS, help="runs of every setting (default %(default)s)")
    add(
        "--threads",
        type=int,
        default=1,
        help="of torch (default %(default)s: most matrices are so small that more rarely pay, and "
        "on a busy machine they wait for each other)",
    )
    add(
        "--quick",
        action="store_true",
        help="short runs on the digits of scikit-learn alone, one to three minutes",
    )


def run(args: argparse.Namespace) -> int:
    """All of it; 0, or 1 and a line on stderr where an option or data is no good; 130: stopped."""
    try:
        chosen, left_out = _choose(args)
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, _data.DataError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    for sentence in left_out:
        print(f"study: {sentence}", file=sys.stderr)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        found = _measure(chosen, args.seeds, args.output)
    except KeyboardInterrupt:
        print("\nstudy: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
    judged = claims([run for all_of in found.values() for run in all_of])
    _write(args.output, found, judged, left_out)
    print(text(judged))
    print(f"\nPage: {(args.output / 'index.html').resolve()}")
    return 0


def _choose(args: argparse.Namespace) -> tuple[dict[Setting, _data.Data], list[str]]:
    """The settings with their data, and a sentence about each that is left out."""
    for option, value in (("--seeds", args.seeds), ("--threads", args.threads)):
        if not 1 <= value <= 1024:
            raise ValueError(f"{option} must be from 1 to 1024, got {value}")
    every = settings.quick() if args.quick else settings.SETTINGS
    wanted = [s for s in every if args.settings is None or s.name in args.settings]
    if args.settings is not None and len(wanted) < len(set(args.settings)):
        raise ValueError(f"--quick has the settings {', '.join(s.name for s in every)} alone")
    chosen, left_out = {}, []
    for setting in wanted:
        try:
            chosen[setting] = settings.load(setting)
        except _data.DataError as error:
            if args.settings is not None:
                raise
            left_out.append(f"{setting.name} is left out: {error}")
    return chosen, left_out


def _measure(chosen: dict[Setting, _data.Data], seeds: int, folder: Path) -> plots.Runs:
    """Every run, read where it is stored and else made and stored."""
    found: plots.Runs = {setting: [] for setting in chosen}
    total = seeds * sum(len(setting.points) for setting in chosen)
    with tqdm(total=total, unit="point", disable=None, leave=False) as bar:

        def progress(doing: str) -> None:
            bar.set_description(doing, refresh=False)
            bar.update()

        for seed in range(seeds):
            for setting, data in chosen.items():
                path = runs.path_of(folder, setting, seed)
                stored = runs.read(path, setting)
                if stored is None:
                    stored = runs.run(setting, data, seed, progress)
                    runs.write(path, runs.as_json(stored))
                else:
                    bar.update(len(setting.points))
                found[setting].append(stored)
    return found


def _write(folder: Path, found: plots.Runs, judged: list[Claim], left_out: list[str]) -> None:
    pictures = {"overview.png": plots.overview(found), "tricks.png": plots.tricks(found)}
    pictures |= {f"{setting.name}.png": plots.layers(setting, found) for setting in found}
    for name, picture in pictures.items():
        runs.write(folder / name, picture)
    for name, kind in (("measurements.csv", "rows"), ("tricks.csv", "tricks")):
        rows = [
            {"setting": setting.name, "seed": run["seed"]} | row
            for setting, all_of in found.items()
            for run in all_of
            for row in run[kind]
        ]
        runs.write(folder / name, _csv(rows))
    runs.write(folder / "index.html", page.render(found, judged, pictures, left_out))


def _csv(rows: Iterable[dict[str, Any]]) -> str:
    rows = list(rows)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def text(judged: list[Claim]) -> str:
    """The claims with their verdicts, for the terminal."""
    return "\n".join(
        f"{claim.verdict.upper()}: {claim.sentence}\n    {claim.measured}" for claim in judged
    )
