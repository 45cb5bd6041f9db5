"""What is known of a captured graph's values without running it on an input: constants and their changes."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from passes.contraction import is_alias


class Constants:
    """The values that hang on parameters, buffers and literals alone, computed when asked for.

    `changed[node]` is the graph position of the last op that writes into the node's memory in place, and
    `position[node]` the node's own. A value that is written to is never called constant.
    """

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._values: dict[Node, Any] = {}
        self.position = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.changed = _changes(gm)
        self._constant: set[Node] = set()
        for node in gm.graph.nodes:
            given = node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor)
            known = all(n in self._constant for n in node.all_input_nodes)
            if known and (given or _is_pure(node)) and node not in self.changed:
                self._constant.add(node)

    def value(self, node: Node) -> Any:
        """The node's value, None if it is no constant or only its metadata exist."""
        if node not in self._constant:
            return None
        if node not in self._values:
            self._values[node] = self._compute(node)
        return self._values[node]

    def number(self, given: Any) -> float | None:
        """A literal or a constant of one element as a number, None for anything else."""
        if isinstance(given, Node):
            given = self.value(given)
            if not isinstance(given, Tensor) or given.numel() != 1:
                return None
            return float(given.item())
        return float(given) if isinstance(given, int | float) else None

    def _compute(self, node: Node) -> Any:
        if node.op == "get_attr":
            value = reduce(getattr, str(node.target).split("."), self._gm)
            real = isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_meta
            return value.detach() if real and isinstance(value, Tensor) else None
        known = {n: self.value(n) for n in node.all_input_nodes}
        if any(value is None for value in known.values()) or not callable(node.target):
            return None
        args, kwargs = map_aggregate(
            (node.args, node.kwargs), lambda a: known[a] if isinstance(a, Node) else a
        )
        with torch.no_grad():
            return node.target(*args, **kwargs)


def _is_pure(node: Node) -> bool:
    """Whether the same inputs always give the same value."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags or "dropout" in node.name
    return not random and "empty" not in node.target._schema.name


def _changes(gm: GraphModule) -> dict[Node, int]:
    """For every node whose memory some op writes to, the position of the last such op."""
    changed: dict[Node, int] = {}
    for position, node in enumerate(gm.graph.nodes):
        if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
            continue
        at = node.args[0]
        changed[node] = position
        while isinstance(at, Node):
            changed[at] = position
            writes = isinstance(at.target, OpOverload) and at.target._schema.is_mutable
            at = at.args[0] if (writes or is_alias(at) or at.target is operator.getitem) else None
    return changed
