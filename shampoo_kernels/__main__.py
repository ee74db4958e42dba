"""python -m shampoo_kernels <command>. A command's own requirements are asked for by it alone."""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence

import shampoo_kernels
from shampoo_kernels.commands import COMMANDS


def main(argv: Sequence[str]) -> int:
    """Run one command; returns its status: 2 where a requirement is missing, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser("python -m shampoo_kernels")
    parser.description = shampoo_kernels.__doc__
    version = f"shampoo_kernels {shampoo_kernels.__version__}"
    parser.add_argument("--version", action="version", version=version)
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    try:
        for name, what in COMMANDS.items():
            subparser = subparsers.add_parser(name, help=what, description=what)
            if name in argv[:1]:
                command = importlib.import_module(f"shampoo_kernels.commands.{name}")
                command.add_arguments(subparser)
        args = parser.parse_args(argv)
        return command.run(args)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("shampoo_kernels"):
            raise
        advice = f"pip install 'shampoo_kernels[{argv[0]}]'"
        print(f"{argv[0]} needs {error.name}, which is not installed: {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{argv[0]}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
