"""The graphs that the passes leave, and rows to draw of them: an op a row, or a piece of new arithmetic a row."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.graph.base import OBSERVER, Pass, PassResult
from passes.graph.ops import EXPANSIONS, PERMUTING, RESHAPES, SDPA
from passes.graph.splice import ORIGIN
from passes.network.branches import blocks_of, find_branches, module_path

aten = torch.ops.aten
VIEWS = {*RESHAPES, *EXPANSIONS, *PERMUTING, aten.unbind.int, aten.alias.default}  # the same numbers, read otherwise
PLAIN = {"to", "mul", "add", "nan_to_num", "abs", "expand", "rsub"}  # not told of where there are others
MOST = 4  # names of ops on a row


@dataclass(frozen=True)
class Row:
    """What is drawn on one line.

    Args:
        label: the op, or what the new arithmetic is for and its ops.
        shape: of the value, the batch as B; "" where it is no tensor.
        inputs: numbers of the rows that it reads.
        band: what it is a part of, "block 0: MLP branch".
        sizes: the shape's literal sizes.
    """

    label: str
    shape: str
    inputs: tuple[int, ...]
    band: str
    sizes: tuple[int, ...]


@contextmanager
def recording() -> Iterator[dict[str, GraphModule]]:
    """While it is open, the graph after each pass by the pass's name, a copy; of several runs the last."""
    graphs: dict[str, GraphModule] = {}

    def keep(pass_: Pass, result: PassResult) -> None:
        graphs[pass_.name] = copied = GraphModule(result.gm, copy.deepcopy(result.gm.graph))
        copied.meta = dict(result.gm.meta)

    token = OBSERVER.set(keep)
    try:
        yield graphs
    finally:
        OBSERVER.reset(token)


def bands(gm: GraphModule) -> Mapping[str, str]:
    """By the path of a module, which branch of which block its ops lie on: found by dataflow, named by path.

    Copies of ops that later passes make keep the path, so a graph in which nothing was rewritten names those of all.
    """
    found: dict[str, str] = {}
    for block in blocks_of(find_branches(gm)):
        for kind, branch in (("attention", block.attention), ("MLP", block.mlp)):
            for node in branch.nodes if branch is not None else ():
                found[module_path(node)] = f"block {block.index}: {kind} branch"
    return found


def rows(
    gm: GraphModule,
    named: Mapping[str, str],
    wanted: Callable[[Node], bool],
    views: bool = False,
    together: Collection[str] = (),
) -> list[Row]:
    """The wanted nodes of a graph, from top to bottom.

    Args:
        named: see `bands`.
        wanted: whether a node is drawn; what it reads beside those is left out.
        views: whether ops that only view a value are drawn as well; else who reads them reads what they view.
        together: kinds of new arithmetic ("score", "gather") of which all ops that hang together are one row.
    """
    live = _live(gm, views)
    drawn = [n for n in gm.graph.nodes if n in live and wanted(n)]
    groups = _together(drawn, together)
    order = _sorted(drawn, groups, live)
    number = {lead: i for i, lead in enumerate(order)}
    read = {lead: [i for n in groups[lead] for i in _inputs(n, drawn, live)] for lead in order}
    made = []
    for lead in order:
        members = groups[lead]
        inputs = {number[_lead(groups, i)] for i in read[lead]} - {number[lead]}
        outside = {i for other in order if other is not lead for i in read[other] if i in members}
        # of several values that others read the one with channels
        shown = max(sorted(outside, key=members.index) or [members[-1]], key=lambda n: len(_sizes(n)))
        made.append(Row(_label(members), _shape(shown), tuple(sorted(inputs)), _band(shown, named), _sizes(shown)))
    return made


def _live(gm: GraphModule, views: bool) -> set[Node]:
    """The ops that work on values of the network: sizes, constants and picks from tuples are left out."""
    running: set[Node] = set()  # depend on the model's input
    for node in gm.graph.nodes:
        shape: Sequence[Any] = getattr(node.meta.get("val"), "shape", ()) if node.op == "placeholder" else ()
        image = len(shape) == 4 and not isinstance(shape[0], int)
        if image or (node.target is not aten.sym_size.int and not running.isdisjoint(node.all_input_nodes)):
            running.add(node)
    return {n for n in running if n.op == "output" or (_computes(n) and (views or n.target not in VIEWS))}


def _computes(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is aten.to.dtype and len(node.args) > 1:
        source = node.args[0]
        return not isinstance(source, Node) or source.meta["val"].dtype != node.args[1]  # else it changes nothing
    return True


def _inputs(node: Node, drawn: Collection[Node], live: Collection[Node]) -> list[Node]:
    """The drawn nodes that it reads, through what is not drawn but passes a value on."""
    found, todo = [], list(node.all_input_nodes)
    while todo:
        n = todo.pop()
        if n in drawn:
            found.append(n)
        elif n.op == "call_function" and n.target is not aten.sym_size.int and n not in live:
            todo += n.all_input_nodes
    return found


def _together(drawn: Sequence[Node], together: Collection[str]) -> dict[Node, list[Node]]:
    """By its first node, the nodes of each row."""
    groups: dict[Node, list[Node]] = {}
    open_: tuple[str, Node] | None = None
    for node in drawn:
        origin = ORIGIN.get(node) or ""
        if origin in together and open_ is not None and open_[0] == origin:
            groups[open_[1]].append(node)
        else:
            groups[node] = [node]
            open_ = (origin, node) if origin in together else None
    return groups


def _lead(groups: Mapping[Node, Sequence[Node]], node: Node) -> Node:
    return next(lead for lead, members in groups.items() if node in members)


def _sorted(drawn: Sequence[Node], groups: Mapping[Node, list[Node]], live: Collection[Node]) -> list[Node]:
    """The rows in an order in which each reads from above, otherwise as in the graph."""
    needs = {
        lead: {_lead(groups, i) for n in members for i in _inputs(n, drawn, live)} - {lead}
        for lead, members in groups.items()
    }
    order: list[Node] = []
    while len(order) < len(groups):
        order.append(next(g for g in groups if g not in order and needs[g] <= set(order)))
    return order


def _label(members: Sequence[Node]) -> str:
    names = list(dict.fromkeys(map(_op, members)))
    if len(members) == 1:
        return names[0]
    told = [n for n in names if n not in PLAIN] or names
    return ", ".join(told) if len(told) <= MOST else f"{len(members)} ops"


def _op(node: Node) -> str:
    if node.op == "output":
        return "output"
    if node.target is SDPA:
        return "SDPA"
    return str(node.target).split(".")[1].removeprefix("linalg_").strip("_")


def _sizes(node: Node) -> tuple[int, ...]:
    val = node.meta.get("val")
    val = val[-1] if isinstance(val, (tuple, list)) else val
    return tuple(s for s in val.shape if isinstance(s, int)) if isinstance(val, torch.Tensor) else ()


def _shape(node: Node) -> str:
    val = node.meta.get("val")
    val = val[-1] if isinstance(val, (tuple, list)) else val
    if not isinstance(val, torch.Tensor):
        return ""
    return re.sub(r"\b[su]\d+\b", "B", f"[{', '.join(map(str, val.shape))}]")


def _band(node: Node, named: Mapping[str, str]) -> str:
    origin = ORIGIN.get(node)
    if origin in ("score", "select", "gather", "restore", "merge", "sizes", "unread"):
        return {"restore": "put back"}.get(origin, origin)
    return named.get(module_path(node), "")
