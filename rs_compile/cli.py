"""The command line: `rs-compile COMMAND`, one of those in `rs_compile.parser`.

Results on stdout, progress and errors on stderr. What the commands do is in `rs_compile.commands`, imported once the
arguments are read, so that a help text waits for nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rs_compile.parser import parser

FAULT, MENDABLE, INTERRUPTED = 1, 2, 130  # exit codes, as `parser.EXIT_CODES` tells them


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        if args.command == "completion":
            from rs_compile.completion import script

            print(script(parser(), args.shell))
        else:
            from rs_compile import commands

            commands.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _failed("interrupted", INTERRUPTED)
    except BrokenPipeError:  # who reads stdout, like head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if args.debug:
            raise
        from rs_compile.errors import told

        return _failed(*told(error))
    return 0


def _failed(text: str, code: int) -> int:
    print(f"rs-compile: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
