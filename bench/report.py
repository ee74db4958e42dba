"""The page of one benchmark run: python bench/report.py results.json > results.md

Prints Markdown, and draws its plots beside the results.
"""

import json
import sys
from pathlib import Path

import page


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: report.py results.json > results.md", file=sys.stderr)
        return 2
    path = Path(argv[0])
    results = json.loads(path.read_text())
    print(page.markdown(results, pictures(results, path.parent)))
    return 0


def pictures(results: dict, folder: Path) -> dict[str, str]:
    """{file: what it shows} of the plots drawn; none without matplotlib, which is said."""
    try:
        import plots
    except ModuleNotFoundError as error:
        print(f"no plots: {error.name} is not installed", file=sys.stderr)
        return {}
    return plots.draw_all(results, folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
