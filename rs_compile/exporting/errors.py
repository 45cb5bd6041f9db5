"""What cannot be exported, named by op, line of the model and a way out."""

from __future__ import annotations

import re

from torch.export import ExportedProgram
from torch.fx import Node

from passes.graph.base import CompileError, op_name, source_line
from passes.graph.codes import Code

_COLOURS = re.compile("\x1b\\[[0-9;]*m")
_LONGEST = 300  # characters of what an exporter said


class ExportError(CompileError):
    """A model, a file or a runtime that does not fit together. The message says what to do instead."""

    family = Code.EXPORT


def refused(exporter: str, error: BaseException, program: ExportedProgram, way_out: str) -> ExportError:
    """What an exporter raised, as an error that names the op and the model's line where it can be told.

    Args:
        exporter: its name, for the message.
        program: what it was given.
        way_out: what to do about it.
    """
    said = _COLOURS.sub("", "\n".join(map(str, _chain(error))))
    node = next((n for n in program.graph.nodes if n.op == "call_function" and _named(n, said)), None)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    about = [line for line in lines if node is not None and _named(node, line)]
    first = (about or lines or [type(error).__name__])[0]
    text = f"{exporter} does not take {op_name(node)}" if node is not None else f"{exporter} failed"
    parts = [f"{text}: {type(error).__name__}: {first[:_LONGEST]}"]
    if node is not None and (line := source_line(node)):
        parts.append(f"  in the model: {line}")
    return ExportError("\n".join([*parts, f"  way out: {way_out}"]))


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _named(node: Node, text: str) -> bool:
    """Whether a text names the node's op, as torch, its schemas or exporters write it."""
    target = str(node.target)  # aten.sort.stable
    op, _, overload = target.rpartition(".")
    space, _, name = op.partition(".")
    spellings = [target, f"{space}::{name}.{overload}", f"{space}::{name}", f"op='{op}', overload='{overload}'"]
    return any(re.search(rf"(?<!\w){re.escape(s)}(?![\w.])", text) for s in spellings if "." in s or "::" in s)
