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

from passes.graph.contraction import is_alias
from passes.graph.ops import aten_name

CPU = torch.device("cpu")
# what these make is the same along a dim whose size is not known: one stands for all
UNIFORM = {"expand", "ones", "zeros", "full"}


class Constants:
    """The values that hang on parameters, buffers and literals alone, computed when asked for.

    A value is exact up to broadcasting: where a size is symbolic (a mask expanded over the batch) it has 1. Values are
    on the CPU, wherever the graph has them: its device may be one that is not here.
    `changed[node]` is the graph position of the last op that writes into the node's memory in place, and
    `position[node]` the node's own. A value that is written to is never called constant.
    """

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._values: dict[Node, Any] = {}
        self.position = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.changed = _changes(gm)
        self._constant: set[Node] = set()
        self._literal: set[Node] = set()
        shortened: set[Node] = set()
        for node in gm.graph.nodes:
            given = node.op == "get_attr" and isinstance(node.meta.get("val"), Tensor)
            if node in self.changed or not (given or _is_pure(node)):
                continue
            inputs = [n for n in node.all_input_nodes if not _is_size(n)]
            sized = len(inputs) < len(node.all_input_nodes)
            if any(n not in self._constant for n in inputs) or (sized and aten_name(node) not in UNIFORM):
                continue
            if any(n in shortened for n in inputs) and not _broadcasts(node):
                continue
            if sized or any(n in shortened for n in inputs):
                shortened.add(node)
            self._constant.add(node)
            if not given and all(n in self._literal for n in inputs):
                self._literal.add(node)

    def value(self, node: Node) -> Any:
        """The node's value, None if it is no constant or only its metadata exist."""
        if node not in self._constant:
            return None
        if node not in self._values:
            self._values[node] = self._compute(node)
        return self._values[node]

    def literal(self, node: Node) -> Any:
        """The node's value if no parameter or buffer is in it, so that nothing can change it; else None."""
        return self.value(node) if node in self._literal else None

    def hides_nothing(self, mask: Node, keeps: bool) -> bool:
        """Whether an attention mask is written down as one that hides no key and adds nothing.

        Args:
            keeps: True stands for a key that is kept; else True for one that is hidden, and numbers are added.
        """
        value = self.literal(mask)
        return value is not None and bool(value.all() if keeps else not value.any())

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
            return value.detach().cpu() if real and isinstance(value, Tensor) else None
        known = {n: 1 if _is_size(n) else self.value(n) for n in node.all_input_nodes}
        if any(value is None for value in known.values()) or not callable(node.target):
            return None

        def given(a: Any) -> Any:
            return known[a] if isinstance(a, Node) else CPU if isinstance(a, torch.device) else a

        args, kwargs = map_aggregate((node.args, node.kwargs), given)
        with torch.no_grad():
            return node.target(*args, **kwargs)


def _broadcasts(node: Node) -> bool:
    """Whether an op treats a dim of 1 as any number of equal entries."""
    tags = getattr(node.target, "tags", ())
    return aten_name(node) in ("expand", "where", "masked_fill") or torch.Tag.pointwise in tags


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _is_pure(node: Node) -> bool:
    """Whether the same inputs always give the same value."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload) or _writes(node):
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags or "dropout" in node.name
    return not random and "empty" not in node.target._schema.name


def _writes(node: Node) -> bool:
    """Whether an op changes the numbers in its first argument's memory."""
    # detach_ only drops that tensor's autograd record
    return (
        isinstance(node.target, OpOverload)
        and node.target._schema.is_mutable
        and node.target is not torch.ops.aten.detach_.default
    )


def _changes(gm: GraphModule) -> dict[Node, int]:
    """For every node whose memory some op writes to, the position of the last such op."""
    changed: dict[Node, int] = {}
    for position, node in enumerate(gm.graph.nodes):
        if not _writes(node):
            continue
        at = node.args[0]
        changed[node] = position
        while isinstance(at, Node):
            changed[at] = position
            at = at.args[0] if (_writes(at) or is_alias(at) or at.target is operator.getitem) else None
    return changed
