"""Removes what does nothing, and turns in-place ops on intermediates into out-of-place ones.

Later passes match on the ops that are left, so the fewer spellings of one computation, the better. Values,
gradients and what the caller can observe of memory stay as they were: an output that was a tensor of its own
remains one. Multiplying by 1 and adding 0 stay: -0.0 + 0 is not -0.0.

Layouts are those of the captured example, so the inputs' strides belong to the signature of a capture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from passes.cleanup.broadcasts import drop_expansions
from passes.cleanup.out_of_place import functionalise
from passes.cleanup.spelled_out import spell_out
from passes.cleanup.transposed_sums import turn_sums
from passes.graph.aliasing import EXTERNAL, Memory, may_require_grad, same_kind
from passes.graph.base import Pass, PassResult
from passes.graph.ops import argument

aten = torch.ops.aten


def _unchanged(node: Node) -> bool:
    """The result has its input's shape, dtype, device and strides."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return False
    a, b = node.meta.get("val"), source.meta.get("val")
    return a is not None and b is not None and same_kind(a, b) and a.dtype == b.dtype


def _idle_dropout(node: Node) -> bool:
    return argument(node, "p") == 0 or argument(node, "train") is False


def _idle_cast(node: Node) -> bool:
    return _unchanged(node) and not argument(node, "copy")


def _overloads(packet: Any) -> list[OpOverload]:
    return [getattr(packet, name) for name in packet.overloads()]


_CASTS = [op for op in _overloads(aten.to) if op._schema.arguments[0].name == "self"]
_DROPOUTS = [
    getattr(aten, name + suffix).default
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for suffix in ("", "_")
]

Rule = Callable[[Node], bool]

# The op returns the very tensor it was given (ATen says `return self`): always safe to remove.
RETURNS_INPUT: dict[Any, Rule] = {
    **dict.fromkeys(_DROPOUTS, _idle_dropout),
    **dict.fromkeys(_CASTS, _idle_cast),
    aten.contiguous.default: _unchanged,
}
# The op copies: safe if nobody writes to either side and the copy is not what the caller gets to own.
COPIES: dict[Any, Rule] = {
    aten.clone.default: _unchanged,
    aten.lift_fresh_copy.default: _unchanged,
    aten._to_copy.default: _unchanged,
    **dict.fromkeys(_CASTS, _unchanged),
}
# The op is another view of all of its input: safe unless the caller gets both objects.
VIEWS: dict[Any, Rule] = {
    aten.alias.default: _unchanged,
    aten.slice.Tensor: _unchanged,
    aten.expand.default: _unchanged,
    aten.reshape.default: _unchanged,
    aten.view.default: _unchanged,
    aten.flatten.using_ints: _unchanged,
}
# The op lays out the same values in the same order: undone by a later one that gives the first shape back.
RESHAPES = {aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unflatten.int}
# Checks without a result. What they state was true of the example, and the shapes are in the signature.
CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


def returns_input(node: Node) -> bool:
    """Whether running this node hands back the tensor it was given, the same object."""
    return node.target in RETURNS_INPUT and RETURNS_INPUT[node.target](node)


@dataclass(frozen=True)
class Canonicalise(Pass):
    """Removes idle dropout, casts, copies, views and checks; in-place ops on intermediates go out-of-place; what reads
    another tensor's sizes or dtype alone gets these; a sum [B, C, N] that is only transposed is taken behind that.

    In-place ops that write to a parameter, a buffer or an input stay as they are, without a word: they are
    what the model does. Those that write through a view which is read again stay with a `Skip`.
    """

    def call(self, gm: GraphModule) -> PassResult:
        rewrites = spell_out(gm.graph) + drop_expansions(gm.graph) + turn_sums(gm.graph)
        while True:  # a removed view can free an in-place op, and that in turn a copy
            converted, skips = functionalise(gm.graph)
            removed = _Sweep(gm.graph).run()
            rewrites += converted + removed
            if not converted + removed:
                return PassResult(gm, rewrites, tuple(skips))


def _undone(node: Node) -> Node | None:
    """What a node is idle to, if it is: its input, or where it ends a row of reshapes that leads back, their start."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    start: Any = source
    while node.target in RESHAPES and isinstance(start, Node) and start.target in RESHAPES:
        start = start.args[0]
        if isinstance(start, Node) and same_kind(node.meta["val"], start.meta["val"]):
            return start
    return source


@dataclass
class _Sweep:
    graph: Graph
    memory: Memory = field(init=False)

    def __post_init__(self) -> None:
        self.memory = Memory(self.graph)

    def run(self) -> int:
        differentiable = may_require_grad(self.graph, self.memory)
        removed = 0
        for node in list(self.graph.nodes):
            source = _undone(node)
            if node.target in CHECKS and not node.users:
                self.graph.erase_node(node)
            elif isinstance(source, Node) and self._idle(node, source, differentiable):
                node.replace_all_uses_with(source)
                self.memory.join(source, node)
                self.graph.erase_node(node)
            else:
                continue
            removed += 1
        return removed

    def _idle(self, node: Node, source: Node, differentiable: set[Node]) -> bool:
        if source is not node.args[0]:
            return self._not_told_apart(node, source)
        if returns_input(node):
            return True
        if node.target in COPIES and COPIES[node.target](node):
            return self._unobserved(node, source)
        if node.target is aten.detach.default:
            constant = source not in differentiable and not self.memory.written(source)
            return constant and self._not_told_apart(node, source)
        return node.target in VIEWS and VIEWS[node.target](node) and self._not_told_apart(node, source)

    def _unobserved(self, copied: Node, source: Node) -> bool:
        memory = self.memory
        if memory.written(copied) or memory.written(source):
            return False
        return not (memory.returned(copied) and (memory.external(source) or memory.returned(source)))

    def _not_told_apart(self, view: Node, source: Node) -> bool:
        outputs = self.graph.output_node().all_input_nodes
        return view not in outputs or not (source in outputs or source.op in EXTERNAL)
