"""`rs-compile demo`: the table, and three pictures as a PNG or on a page."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from passes.graph.base import CompileError
from passes.graph.codes import Code
from rs_compile.demo.page import page
from rs_compile.demo.result import Demo
from rs_compile.demo.run import run as run_demo
from rs_compile.timing import Say
from rs_compile.visualize.picture import MissingLibrary


def check_outputs(args: argparse.Namespace) -> None:
    """Before minutes of work, not after them.

    Raises:
        CompileError: a file cannot be written there, or matplotlib, which draws, is missing.
    """
    for option, path, ending in (("--html", args.html, ".html"), ("--picture", args.picture, ".png")):
        if path is None:
            continue
        if path.suffix.lower() != ending or path.is_dir() or not path.absolute().parent.is_dir():
            raise CompileError(f"{option} {path}: write a {ending} file in a folder that exists", code=Code.COMMAND)
        if find_spec("matplotlib") is None:
            raise MissingLibrary(
                f"{option}: pictures are drawn by matplotlib, which is not installed; way out: pip install matplotlib"
            )


def run(args: argparse.Namespace, say: Say) -> Demo:
    """Measures, and writes what was asked for."""
    result = run_demo(args.backend, args.quick, say)
    if args.html is not None or args.picture is not None:
        from rs_compile.demo.figure import drawn

        say("drawing: three pictures")
        png = drawn()
        _write(args.picture, png)
        _write(args.html, page(result, png).encode())
    return result


def _write(path: Path | None, content: bytes) -> None:
    if path is None:
        return
    try:
        path.write_bytes(content)
    except OSError as error:
        raise CompileError(f"{path}: {error.strerror}; it was not written", code=Code.COMMAND) from error
