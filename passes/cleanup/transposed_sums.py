"""A residual stream [B, C, N] that its norms transpose to [B, N, C] and back, kept as [B, N, C].

A sum that only a transposition reads is taken behind it, where one of its terms was transposed the other way before:
there is one transposition as before, of the other term, and what the terms meet in is the value before both.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, Node

from passes.graph.aliasing import same_kind
from passes.graph.ops import permuted, sizes_of
from passes.graph.splice import fake, fake_mode

aten = torch.ops.aten
_SWAP = [0, 2, 1]


def turn_sums(graph: Graph) -> int:
    """Takes such sums behind the transposition; returns how many."""
    count = 0
    for total in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        reader = next(iter(total.users), None)
        if reader is None or len(total.users) > 1 or not _swaps(reader):
            continue
        terms = [a for a in total.args if isinstance(a, Node) and sizes_of(a) == sizes_of(total)]
        if len(terms) == 2 and any(map(_swaps, terms)) and _turn(graph, total, reader):
            count += 1
    return count


def _swaps(node: Node) -> bool:
    """Whether a node gives [B, C, N] as [B, N, C]."""
    return node.op == "call_function" and permuted(node) == _SWAP


def _turn(graph: Graph, total: Node, reader: Node) -> bool:
    """Puts the turned sum in the reader's place, unless it would lie in memory in another way."""
    made: list[Node] = []

    def add(like: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        new = graph.call_function(target, args, kwargs)
        new.meta = {**copy.copy(like.meta), "val": target(*fake(args), **kwargs)}
        made.append(new)
        return new

    with graph.inserting_before(total), fake_mode(graph), enable_python_dispatcher(), torch.no_grad():
        terms = tuple(
            a.args[0] if _swaps(a) else add(reader, aten.permute.default, (a, _SWAP), {})
            for a in total.args
            if isinstance(a, Node)
        )
        turned = add(total, aten.add.Tensor, terms, dict(total.kwargs))
    if not same_kind(turned.meta["val"], reader.meta["val"]):
        for unused in reversed(made):
            graph.erase_node(unused)
        return False
    reader.replace_all_uses_with(turned)
    graph.erase_node(reader)
    graph.erase_node(total)
    return True
