"""Analysis: which residual sums are of one stream, so that what left at one of them may come back at another."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch.fx import Node

from passes.graph.ops import CONV, LINEAR, PRODUCTS
from passes.network.branches import Branch

_PROJECTIONS = LINEAR | CONV | PRODUCTS


def same_stream(branches: Sequence[Branch], at: Node) -> list[Node]:
    """The sums of the stream that `at` is a value of: no projection lies between one and the next.

    A linear layer between an encoder and a decoder gives channels another meaning, of whatever width they are.
    """
    sums = {branch.add for branch in branches}
    streams: list[set[Node]] = []
    for branch in branches:
        met = {branch.add, *_behind(branch.stream, sums)}
        apart = [stream for stream in streams if not stream & met]
        streams = [*apart, met.union(*(stream for stream in streams if stream & met))]
    own = {at, *_behind(at, sums)}
    return [branch.add for branch in branches if any(branch.add in stream and stream & own for stream in streams)]


def _behind(value: Node, sums: Collection[Node]) -> set[Node]:
    """The values, up to the next sums, that one is made from through norms and casts; where it starts among them."""
    seen: set[Node] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        if node not in seen and node.op != "get_attr" and node.target not in _PROJECTIONS:
            seen.add(node)
            todo += [] if node in sums else node.all_input_nodes
    return seen
