"""Each pass's graph as text, what it changed, and a full check behind it: for who works on a pass."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from passes.graph.base import OBSERVER, CompileError, Pass, PassResult, Postcondition, Refusal, source_line
from passes.graph.layout import LAYOUTS, show
from passes.graph.verify import no_stale_shapes


@contextmanager
def watched(folder: str | Path) -> Iterator[Path]:
    """While it is open, each pass leaves its graph in a file of its own, `03-Canonicalise.txt`, and is checked.

    Args:
        folder: where; made where it is not there. A further graph gets a folder of its own in it, "1", "2", ...

    Raises:
        Postcondition: a pass left a value whose shape, dtype or device is not what its node says.
    """
    top = Path(folder)
    top.mkdir(parents=True, exist_ok=True)
    home = next(p for i in range(1, 1_000_000) if not (p := top / str(i)).exists())
    home.mkdir()
    before: list[str] = []
    outer = OBSERVER.get()

    def observe(pass_: Pass, result: PassResult) -> None:
        nonlocal before
        now = as_text(result.gm)
        number = len(list(home.glob("*.txt")))
        changes = [line for line in difflib.unified_diff(before, now, "before", "after", lineterm="", n=1) if before]
        head = f"{pass_!r}: {result.rewrites} rewrites, {len(result.skips)} skips; {len(now)} nodes"
        (home / f"{number:02}-{pass_.name}.txt").write_text(
            "\n".join([head, *(f"skipped {s.node}: {s.reason}" for s in result.skips), "", *now, "", *changes, ""])
        )
        before = now
        if outer is not None:
            outer(pass_, result)
        if not pass_.leaves_dead_code:
            try:
                no_stale_shapes(result.gm)
            except Refusal:
                raise  # of the model
            except CompileError as error:
                raise Postcondition(f"after pass {pass_.name}: {error.text}", pass_.name, result.gm) from error

    token = OBSERVER.set(observe)
    try:
        yield home
    finally:
        OBSERVER.reset(token)


def as_text(gm: GraphModule) -> list[str]:
    """A line a node: its name, op, arguments, shape, layout where it runs over tokens, and the model's line."""

    def shape(val: Any) -> str:
        if isinstance(val, torch.Tensor):
            return f"{str(val.dtype).removeprefix('torch.')}[{', '.join(map(str, val.shape))}]"
        return f"({', '.join(map(shape, val))})" if isinstance(val, (tuple, list)) else str(val)

    lines: list[str] = []
    layouts = LAYOUTS.get(gm) or {}
    for node in gm.graph.nodes:
        arguments = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
        where = source_line(node).split(": ")[0]
        val = node.meta.get("val")
        layout = show(layouts[node]) if node in layouts and isinstance(val, torch.Tensor) else ""
        notes = "  ".join(filter(None, (shape(val), layout, where)))
        lines.append(f"{node.name} = {node.target}({arguments})  # {notes}")
    return lines
