"""The tables of a run in Markdown: a summary, one table an op, and what was counted."""

from collections import defaultdict
from statistics import median

WORDS = (
    "Milliseconds: medians of rounds in which all functions take turns, ± the interquartile range; "
    "errors: relative to float64, in the worst block; in brackets how many times faster ours is. "
    "% of limit: the least time that the useful operations or the bytes need at a rate measured at "
    "the start of this run, over the time taken; the limit is named. The rate of the copy is the "
    "memory's, so what fits into the cache can pass 100 %."
)


def markdown(results: dict, pictures: dict[str, str] | None = None) -> str:
    facts = results["machine_info"]["shampoo_kernels"]
    groups = grouped(results["benchmarks"])
    lines = [*head(results, facts), "", *summary(groups)]
    for file, what in (pictures or {}).items():
        lines += ["", f"![{what}]({file})", "", what]
    for name, rows in groups.items():
        lines += ["", f"### {name}", "", *table(rows, facts)]
    for name, rows in results.get("tables", {}).items():
        lines += ["", f"### {name}", "", *plain_table(rows)]
    if results.get("left_out"):
        lines += ["", *results["left_out"]]
    return "\n".join(lines)


def grouped(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by file, and by function where a file has several: "inverse_root: roots"."""
    groups = defaultdict(list)
    for row in rows:
        groups[op_of(row)].append(row)
    return dict(groups)


def op_of(row: dict) -> str:
    file, _, function = row["fullname"].partition("::")  # "/" may stand in what comes in brackets
    file = file.rpartition("/")[2].removeprefix("bench_").removesuffix(".py")
    function = function.partition("[")[0].removeprefix("bench_")
    return file if function == file else f"{file}: {function.replace('_', ' ')}"


def head(results: dict, facts: dict) -> list[str]:
    peaks = ", ".join(f"{name} GEMM {rate:.0f}" for name, rate in facts["gemm_gflops"].items())
    if "fma_gflops" in facts:
        peaks += f", float32 FMA {facts['fma_gflops']:.0f}"
    commit = results["commit_info"].get("id") or "no commit"
    changed = ", with changes" if results["commit_info"].get("dirty") else ""
    peers = ", ".join(f"{name} {v}" for name, v in facts.get("peers", {}).items())
    load = facts.get("load")
    lines = [
        f"{facts['cpu']}, {facts['threads']} threads, kernels: {facts['isa']}. Python "
        f"{facts['python']}, torch {facts['torch']}, shampoo_kernels {facts['shampoo_kernels']} "
        f"({commit}{changed}){', ' * bool(peers)}{peers}; {results['datetime'][:10]}; "
        f"`{facts.get('command', 'make bench')}`.",
        "",
        f"Measured in this run: {peaks} GFLOP/s; copy {facts['copy_gbs']:.0f} GB/s. {WORDS}",
    ]
    if load is not None and load > 0.5 * facts["threads"]:
        lines += ["", f"**The machine was not quiet: load average {load:.1f} at the start.**"]
    return lines


def summary(groups: dict[str, list[dict]]) -> list[str]:
    """What a reader wants first: per op and baseline, how many times faster, and how accurate."""
    lines = [
        "| op | against | rows | times faster: least, median, most | error, ours | error, theirs |",
        "|" + " --- |" * 6,
    ]
    for op, rows in groups.items():
        for name in baseline_names(rows):
            if name.startswith("our"):
                continue  # another method or backend of ours
            pairs = [(row, row["extra_info"]["baselines"][name]) for row in rows
                     if name in row["extra_info"]["baselines"]]  # fmt: skip
            failing = sum(name in row["extra_info"].get("failed", {}) for row in rows)
            good = [seconds(t) / row["stats"]["median"] for row, t in pairs
                    if name not in row["extra_info"].get("failed", {})]  # fmt: skip
            ratios = f"{min(good):.2f}, **{median(good):.2f}**, {max(good):.2f}" if good else ""
            fails = f"; fails in {failing}" if failing else ""
            errors = [worst(rows, "ours", name), worst(rows, name, name)]
            lines.append(
                f"| {op} | {name} | {len(good)}{fails} | {ratios} | {' | '.join(errors)} |"
            )
    return lines


def worst(rows: list[dict], name: str, baseline: str) -> str:
    """The largest error in the rows where the baseline is good."""
    found = [
        row["extra_info"]["errors"][name]
        for row in rows
        if name in row["extra_info"]["errors"]
        and baseline in row["extra_info"]["errors"]
        and baseline not in row["extra_info"].get("failed", {})
    ]
    return f"{max(found):.1e}" if found else ""


def seconds(times: dict | float) -> float:
    return times["median"] if isinstance(times, dict) else times


def baseline_names(rows: list[dict]) -> list[str]:
    infos = [row["extra_info"] for row in rows]
    every = [name for info in infos for name in (*info["baselines"], *info.get("failed", {}))]
    return list(dict.fromkeys(name for name in every if name != "ours"))


def limit(info: dict, facts: dict) -> tuple[float, str] | None:
    """Seconds that the useful operations or the bytes need at the rates measured, whichever is
    more, and the name of that rate."""
    rates = {f"{info.get('rate', 'float32')} GEMM": facts["gemm_gflops"].get(info.get("rate"), 0)}
    rates["float32 GEMM"] = facts["gemm_gflops"]["float32"]
    if "fma_gflops" in facts:
        rates["float32 FMA"] = facts["fma_gflops"]
    name = max(rates, key=lambda key: rates[key])
    found = []
    if info.get("flops"):
        found.append((info["flops"] / rates[name] / 1e9, name))
    if info.get("moved"):
        found.append((info["moved"] / facts["copy_gbs"] / 1e9, "copy"))
    return max(found) if found else None


def table(rows: list[dict], facts: dict) -> list[str]:
    """A row a case; a column for every baseline: milliseconds, the speed-up over it, its error."""
    names = baseline_names(rows)
    lines = [
        f"| {' | '.join(['case', 'ours, ms', 'error', '% of limit', *names])} |",
        "|" + " --- |" * (4 + len(names)),
    ]
    for row in rows:
        info, ours = row["extra_info"], row["stats"]["median"]
        failed, bound = info.get("failed", {}), limit(info, facts)
        cells = [info["case"], shown(row["stats"])]
        cells.append(
            error_of(info, "ours") + f" **fails** ({failed.get('ours')})" * ("ours" in failed)
        )
        cells.append(f"{100 * bound[0] / ours:.0f}, {bound[1]}" if bound else "")
        for name in names:
            times = info["baselines"].get(name)
            cell = shown(times) if times is not None else ""
            if name in failed:
                cell += f" **fails**: {failed[name]}"
            elif times is not None:
                cell += f" (**{seconds(times) / ours:.2f}x**) {error_of(info, name)}"
            cells.append(cell.strip())
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def shown(times: dict | float) -> str:
    """Milliseconds ± the interquartile range in percent."""
    middle = seconds(times)
    if not isinstance(times, dict):
        return f"{1e3 * middle:.3g}"
    return f"{1e3 * middle:.3g} ± {100 * (times['q3'] - times['q1']) / middle:.0f} %"


def error_of(info: dict, name: str) -> str:
    error = info["errors"].get(name)
    return "" if error is None else f"{error:.1e}"


def plain_table(rows: list[dict]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    for row in rows:
        cells = (row.get(name, "") for name in names)
        lines.append(
            f"| {' | '.join(f'{c:.4g}' if isinstance(c, float) else str(c) for c in cells)} |"
        )
    return lines
