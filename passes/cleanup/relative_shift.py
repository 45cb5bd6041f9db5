"""Transformer-XL's relative shift, written as what it is: for each query, a pick out of its own row.

Scores [..., N, R] of N queries for R relative distances become scores [..., N, C] for C keys by reshapes and slices
that skew the matrix. Each entry of the result comes from the row that it is in, so `gather` with a table of columns
gives the same, bit for bit, and means the same when queries and keys leave.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph.aliasing import Memory
from passes.graph.base import Pass, PassResult
from passes.graph.ops import VIEWS, argument, sizes_of, wrap
from passes.graph.splice import replace_by

aten = torch.ops.aten
_PICKS = {aten.slice.Tensor}


@dataclass(frozen=True)
class WriteRelativeShifts(Pass):
    """Writes such rows of reshapes and slices as `gather`."""

    def call(self, gm: GraphModule) -> PassResult:
        found = [node for node in gm.graph.nodes if node.target in _PICKS]
        memory, order = Memory(gm.graph), {node: i for i, node in enumerate(gm.graph.nodes)}
        count = 0
        for node in reversed(found):
            shift = _shift(node)
            if shift is not None and _alone(node, memory, order):
                source, start, down, across = shift
                n, c = (int(size) for size in node.meta["val"].shape[-2:])

                def pick(x: Tensor, a: int = start, b: int = down, d: int = across, n: int = n, c: int = c) -> Tensor:
                    rows, columns = (torch.arange(size, device=x.device) for size in (n, c))
                    return x.gather(-1, (a + b * rows[:, None] + d * columns).expand(*x.shape[:-1], c))

                replace_by(gm, node, "relative shift", pick, source)
                count += 1
        return PassResult(gm, rewrites=count)


def _alone(last: Node, memory: Memory, order: dict[Node, int]) -> bool:
    """Whether nobody can tell that the pick is a copy: no caller has it, and who writes into it writes for itself."""
    before = [m for m in memory.members(last) if order.get(m, -1) < order[last]]
    private = all(len(m.users) == 1 and m.op == "call_function" for m in before)
    return not memory.returned(last) and (private or not memory.written(last))


def _shift(last: Node) -> tuple[Node, int, int, int] | None:
    """What a pick skews, and which of its columns entry (i, j) is: start + down * i + across * j."""
    chain, source = [last], last.args[0]
    while isinstance(source, Node) and source.target in VIEWS | _PICKS:
        if sum(node.target in VIEWS for node in chain) >= 2:
            break
        chain.append(source)
        source = source.args[0]
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    whole, out = sizes_of(source) or (), sizes_of(last) or ()
    lead = whole[:-2]
    if sum(node.target in VIEWS for node in chain) < 2 or len(whole) < 3 or whole[:-1] != out[:-1]:
        return None
    if any(
        (s := sizes_of(node) or ())[:-2] != lead or any(x.free_symbols for x in s[-2:]) for node in (*chain, source)
    ):
        return None
    n, r = int(whole[-2]), int(whole[-1])
    table = torch.arange(n * r).reshape(n, r)
    for node in reversed(chain):
        table = _moved(table, node, len(lead))
    return _affine(source, table, r)


def _moved(table: Tensor, node: Node, lead: int) -> Tensor:
    """A matrix behind an op of the chain."""
    if node.target in VIEWS:
        return table.reshape([int(s) for s in node.meta["val"].shape[-2:]])
    d = wrap(argument(node, "dim"), table.dim() + lead) - lead
    if d < 0:  # the sizes in front are equal, so it takes all of them
        return table
    start, end, step = argument(node, "start"), argument(node, "end"), argument(node, "step")
    part: Tensor = aten.slice.Tensor(table, d, start, end, step)
    return part


def _affine(source: Node, table: Tensor, r: int) -> tuple[Node, int, int, int] | None:
    """The columns of a table of entries, where each is in its own row and they follow one step down and one across."""
    rows, columns = (torch.arange(size) for size in table.shape)
    if len(rows) < 2 or len(columns) < 2 or not torch.equal(table // r, rows[:, None].expand_as(table)):
        return None
    at = table % r
    start, down, across = int(at[0, 0]), int(at[1, 0] - at[0, 0]), int(at[0, 1] - at[0, 0])
    return (source, start, down, across) if torch.equal(at, start + down * rows[:, None] + across * columns) else None
