"""The paper's tables and figures: `python -m bench COMMAND`. Results on stdout, progress on stderr.

Exit codes: 0 done, 1 done without some files that could not be read, 2 something that the user can mend (the
message says how), 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from bench import compile_time, costs, finetune, table7
from bench.coverage import command as coverage
from bench.tables import fidelity, figure1, figure3, figure5, table1, table2, table3, table4, table5, table6, table8
from bench.tables.pictures import figure4, figure6, figure7
from bench.throughput import command as throughput
from passes.graph.base import CompileError


class Command(Protocol):
    """A module that is a command; the first paragraph of its docstring is its help."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


COMMANDS: dict[str, Command] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "table5": table5,
    "table6": table6,
    "table7": table7,
    "table8": table8,
    "figure1": figure1,
    "figure3": figure3,
    "figure4": figure4,
    "figure5": figure5,
    "figure6": figure6,
    "figure7": figure7,
    "fidelity": fidelity,
    "finetune": finetune,
    "compile-time": compile_time,
    "throughput": throughput,
    "costs": costs,
    "coverage": coverage,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="The paper's tables and figures.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = (module.__doc__ or "").partition("\n\n")[0]
        module.add_arguments(subparsers.add_parser(name, help=text, description=text))
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command].run(args)
    except CompileError as error:
        print(f"bench {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bench {args.command}: interrupted; rows measured so far are in --json, if given", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
