"""Analysis: which residual sums are of one stream, so that what left at one of them may come back at another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Node

from passes.branches import CONV, LINEAR, PRODUCTS, Branch

_PROJECTIONS = LINEAR | CONV | PRODUCTS


def same_stream(branches: Sequence[Branch], at: Node) -> list[Node]:
    """The sums of the stream that `at` is a value of: no projection lies between one and the next.

    A linear layer between an encoder and a decoder gives channels another meaning, of whatever width they are.
    """
    origins: dict[Node, Node] = {}
    for branch in branches:  # in the order of the graph
        origins[branch.add] = _origin(branch.stream, origins)
    return [add for add, origin in origins.items() if origin is _origin(at, origins)]


def _origin(value: Node, origins: Mapping[Node, Node]) -> Node:
    """That of a sum which the value is made from, through norms and casts; else the value itself."""
    seen: set[Node] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        if node in origins:
            return origins[node]
        if node not in seen and node.target not in _PROJECTIONS:
            todo += node.all_input_nodes
        seen.add(node)
    return value
