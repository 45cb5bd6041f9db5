"""Ops that read nothing of a tensor but its sizes, or its dtype, get these themselves.

As it stands, `mask.expand_as(scores)` is computed from the scores, so where tokens leave them it would have to change
with them. By its sizes it is what it is: the mask, broadcast, a value of its own with an entry per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten

BY_SIZES = {
    aten.expand_as.default: aten.expand.default,
    aten.view_as.default: aten.view.default,
    aten.reshape_as.default: aten.reshape.default,
}


def spell_out(graph: Graph) -> int:
    """Writes such ops with sizes or a dtype in place of the tensor that has them; returns how many."""
    count = 0
    for node in list(graph.nodes):
        if node.target not in (*BY_SIZES, aten.type_as.default):
            continue
        given = [*node.args, *node.kwargs.values()]
        value, other = given[0], given[1]
        assert isinstance(value, Node) and isinstance(other, Node)
        if node.target in BY_SIZES:
            with graph.inserting_before(node):
                sizes = [_size(graph, node, value, other, d) for d in range(other.meta["val"].dim())]
            node.target, node.args, node.kwargs = BY_SIZES[node.target], (value, sizes), {}
        elif value.meta["val"].device == other.meta["val"].device:
            node.target, node.args, node.kwargs = aten.to.dtype, (value, other.meta["val"].dtype), {}
        else:
            continue
        count += 1
    return count


def _size(graph: Graph, node: Node, value: Node, other: Node, dim: int) -> Any:
    """One size as an argument: a number, -1 for what the value has itself, else read off the other tensor."""
    size, own = other.meta["val"].shape[dim], value.meta["val"].shape
    if isinstance(size, int):
        return size
    at = dim + len(own) - other.meta["val"].dim()
    if node.target is aten.expand_as.default and at >= 0 and isinstance(own[at], torch.SymInt):
        return -1  # only a size of one grows, which is never a symbol
    read = graph.call_function(aten.sym_size.int, (other, dim))
    read.meta = {**node.meta, "val": size}
    return read
