"""Completion of commands and options by a shell."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import shtab


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What the shell has to read; options that take a path complete file names.

    Args:
        shell: "bash" or "zsh".
    """
    _complete_files(parser)
    written: str = shtab.complete(parser, shell)
    return written


def _complete_files(parser: argparse.ArgumentParser) -> None:
    actions: list[Any] = parser._actions  # argparse has no public list of them, nor shtab's attribute
    for action in actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                _complete_files(sub)
        elif action.type is Path or action.dest == "json":
            action.complete = shtab.FILE
