"""The paper's tables and figures: `python -m bench COMMAND`. Results on stdout, progress on stderr.

Exit codes: 0 done, 1 done without some files that could not be read, 2 something that the user can mend (the
message says how), 130 interrupted. A command's module is imported once it is named, so that the list of them all
waits for nothing.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol


class Command(Protocol):
    """A module that is a command; the first paragraph of its docstring is its help."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


COMMANDS = {
    "table1": "bench.tables.table1",
    "table2": "bench.tables.table2",
    "table3": "bench.tables.table3",
    "table4": "bench.tables.table4",
    "table5": "bench.tables.table5",
    "table6": "bench.tables.table6",
    "table7": "bench.table7",
    "table8": "bench.tables.table8",
    "figure1": "bench.tables.figure1",
    "figure3": "bench.tables.figure3",
    "figure4": "bench.tables.figure4",
    "figure5": "bench.tables.figure5",
    "figure6": "bench.tables.figure6",
    "figure7": "bench.tables.figure7",
    "layers": "bench.tables.layers",
    "published": "bench.tables.published",
    "fidelity": "bench.tables.fidelity",
    "fidelity-macs": "bench.tables.equal_macs",
    "finetune": "bench.finetune",
    "compile-time": "bench.compile_time",
    "throughput": "bench.throughput.command",
    "costs": "bench.costs",
    "runtimes": "bench.runtimes",
    "gpu": "bench.gpu.command",
    "coverage": "bench.coverage.command",
    "support": "bench.support.command",
    "graphs": "bench.graphs.command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench", description="The paper's tables and figures.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = summary(module)
        # argparse fills % in a help, and not in a description
        subparser = subparsers.add_parser(name, help=text.replace("%", "%%"), description=text)
        if name in argv[:1]:  # there is no option before the command
            _command(name).add_arguments(subparser)
    args = parser.parse_args(argv)
    from passes.graph.base import CompileError

    try:
        return _command(args.command).run(args)
    except CompileError as error:
        print(f"bench {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"bench {args.command}: interrupted; rows measured so far are in --json, if given", file=sys.stderr)
        return 130


def summary(module: str) -> str:
    """The first paragraph of a module's docstring, read without running the module."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return (ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or "").partition("\n\n")[0]


def _command(name: str) -> Command:
    command: Command = import_module(COMMANDS[name])
    return command


if __name__ == "__main__":
    sys.exit(main())
