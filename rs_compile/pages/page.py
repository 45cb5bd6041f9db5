"""A page from its template: style and scripts go inside, so that it opens from a file and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from passes.graph.base import CompileError
from passes.graph.codes import Code
from rs_compile.drift import shown

# matplotlib's viridis at even steps: perceptually even, and readable to the colour-blind
VIRIDIS = (
    "#440154", "#48186a", "#472d7b", "#424086", "#3b528b", "#33638d", "#2c728e", "#26828e", "#21918c",
    "#1fa088", "#28ae80", "#3fbc73", "#5ec962", "#84d44b", "#addc30", "#d8e219", "#fde725",
)  # fmt: skip


def write_page(path: str | os.PathLike[str], template: str, **content: Any) -> None:
    """Writes what `render` makes of the same arguments.

    Raises:
        CompileError: the file cannot be written.
    """
    text = render(template, **content)  # a template that is missing would be an OSError too
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CompileError(f"{path}: {error.strerror}; no page was written", code=Code.COMMAND) from error


def check_page(path: Path, option: str) -> None:
    """Refuses, before minutes of work, where no page can be written.

    Raises:
        CompileError: it does not end in .html, or there is no such directory.
    """
    if path.suffix.lower() != ".html":
        raise CompileError(f"{option} {path}: a page ends in .html; name the file so", code=Code.COMMAND)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise CompileError(
            f"{option} {path}: no file can be written there; give one in a directory that exists", code=Code.COMMAND
        )


def render(template: str, *, scripts: Sequence[str] = (), **content: Any) -> str:
    """One HTML file.

    Args:
        template: a file of this folder; what it prints is escaped.
        scripts: files of this folder that the page runs, behind those of every page.
        content: what the template reads.
    """
    script = "\n".join(_file(name) for name in ("page.js", *scripts))
    # no other script runs, whatever a name or a message holds
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made = {"style": Markup(_file("style.css")), "script": Markup(script), "digest": digest}
    return _environment().get_template(template).render(**made, torch=torch.__version__, **content)


def _file(name: str) -> str:
    return files("rs_compile.pages").joinpath(name).read_text(encoding="utf-8").strip()


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("rs_compile.pages", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    made.filters |= {"giga": _giga, "fixed": _fixed, "drift": _drift, "shown": shown, "runs": _runs}
    return made


def _giga(value: float) -> str:
    """1e9ths, with three digits behind the point as in tables."""
    return f"{value / 1e9:.3f}"


def _fixed(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}"


def _drift(value: float) -> str:
    """Three digits, however small."""
    return f"{value:.3g}"


def _runs(numbers: Iterable[int]) -> str:
    """Ascending numbers in words: 0, 1, 2, 5 as "0 to 2, 5"."""
    found: list[list[int]] = []
    for n in numbers:
        if found and n == found[-1][-1] + 1:
            found[-1].append(n)
        else:
            found.append([n])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in found)
