"""Which values of a graph may share memory, which ops write to it, which values may carry gradients."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from passes.graph.fake import call_key, memory_of
from passes.graph.ops import CONV, LINEAR, NORMS, SDPA, SOFTMAX, same_sizes
from passes.graph.splice import fake, fake_mode

aten = torch.ops.aten

EXTERNAL = ("placeholder", "get_attr")  # memory that the caller or the model owns

# ops that update the tensors at these positions without saying so in their schema, if the flag is set
_UNDECLARED_WRITES = {aten.batch_norm.default: ((3, 4), 5), aten.instance_norm.default: ((3, 4), 5)}
# composite ops whose result is always new: most of a network, and replaying them takes time
FRESH = LINEAR | CONV | NORMS | SOFTMAX | {SDPA, aten.matmul.default}
# the schema says "writes", but only autograd's record changes, never memory
_NO_WRITES = {aten.detach_.default}


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a (possibly nested) value."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def nodes_in(value: Any) -> list[Node]:
    """The nodes in a (possibly nested) argument."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Node)]


def same_kind(a: Any, b: Any) -> bool:
    """Equal shape, device and memory layout; the dtype may differ."""
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and a.layout == b.layout == torch.strided
        and a.device == b.device
        and same_sizes(a.shape, b.shape)
        and same_sizes(a.stride(), b.stride())
    )


def bodies(node: Node) -> list[GraphModule]:
    """The subgraphs that a higher-order op runs."""
    owner = node.graph.owning_module
    if not isinstance(node.target, HigherOrderOperator) or owner is None:
        return []
    named = [attrgetter(str(a.target))(owner) for a in node.all_input_nodes if a.op == "get_attr"]
    return [value for value in named if isinstance(value, GraphModule)]


def _declared(node: Node, target: OpOverload) -> Iterator[tuple[Any, list[Node]]]:
    for position, argument in enumerate(target._schema.arguments):
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None:
            yield argument.alias_info, nodes_in(value)


def writes(node: Node) -> list[Node]:
    """The values whose memory this node changes."""
    if bodies(node):
        wrote = any(writes(inner) for body in bodies(node) for inner in body.graph.nodes)
        return [a for a in node.all_input_nodes if tensors(a.meta.get("val"))] if wrote else []
    if not isinstance(node.target, OpOverload) or node.target in _NO_WRITES:
        return []
    declared = _declared(node, node.target) if node.target._schema.is_mutable else ()
    written = [n for info, nodes in declared if info.is_write for n in nodes]
    if node.target in _UNDECLARED_WRITES:
        positions, flag = _UNDECLARED_WRITES[node.target]
        if len(node.args) <= flag or node.args[flag]:
            written += [a for p in positions for a in nodes_in(node.args[p : p + 1])]
    return written


def moves_statistics(node: Node) -> bool:
    """Whether this is a norm that updates its running statistics."""
    return node.target in _UNDECLARED_WRITES and bool(writes(node))


def _shared_with(node: Node) -> list[Node]:
    """The inputs whose memory the result may share."""
    if node.op != "call_function" or ("val" in node.meta and not tensors(node.meta["val"])):
        return []
    if node.target is operator.getitem:
        return nodes_in(node.args[0])
    if not isinstance(node.target, OpOverload):
        return list(node.all_input_nodes)
    if any(returned.alias_info is not None for returned in node.target._schema.returns):
        return [n for _, nodes in _declared(node, node.target) for n in nodes]
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(node.target.name(), "CompositeImplicitAutograd")
    if node.target in FRESH or not composite:
        return []
    # composite ops (type_as, einsum, meshgrid, dropout) may return an input without declaring it: ask
    inputs = [a for a in node.all_input_nodes if tensors(a.meta.get("val"))]
    owners = [_storages(a.meta["val"]) for a in inputs]
    mode, call = fake_mode(node.graph), call_key(node.target, fake(node.args), fake(node.kwargs))
    # which arguments are one value, and which values share memory, is part of the case
    one = tuple(node.all_input_nodes.index(a) for a in nodes_in((node.args, node.kwargs)))
    together = tuple((i, j) for i, a in enumerate(owners) for j in range(i) if a & owners[j])
    key, memory = ("shares", call, one, together), memory_of(mode)
    if call is None or key not in memory:
        # asked only: what the replay would guard on, a batch of that size, must not stay
        unguarded = mode.shape_env.suppress_guards() if mode.shape_env is not None else contextlib.nullcontext()
        try:
            with mode, unguarded, enable_python_dispatcher(), torch.no_grad():
                made = _storages(node.target(*fake(node.args), **fake(node.kwargs)))
        except Exception:
            return inputs  # cannot be replayed: assume the worst
        memory[key] = [i for i, a in enumerate(owners) if made & a]
    return [inputs[i] for i in memory[key]]


def _storages(value: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors(value)}


class Memory:
    """Classes of values that may ever share memory; without regard to when, so they err on the safe side.

    Args:
        graph: the graph, each node with its fake value in `meta["val"]`.
    """

    def __init__(self, graph: Graph) -> None:
        self._parent: dict[Node, Node] = {}
        self._members: dict[Node, list[Node]] = {n: [n] for n in graph.nodes}
        self._written: set[Node] = set()
        self._output = graph.output_node()
        for node in graph.nodes:
            for source in _shared_with(node):
                self.join(node, source)
        for node in graph.nodes:
            self._written.update(self._root(target) for target in writes(node))

    def _root(self, node: Node) -> Node:
        while node in self._parent:
            node = self._parent[node]
        return node

    def join(self, a: Node, b: Node) -> None:
        """Puts two values into one class; a new node may be joined to an old one."""
        one, other = self._root(a), self._root(b)
        if one is other:
            return
        self._parent[other] = one
        self._members[one] = self._members.get(one, [one]) + self._members.pop(other, [other])
        if other in self._written:
            self._written.add(one)

    def members(self, node: Node) -> list[Node]:
        """Every value that may share memory with this one, itself included."""
        return self._members.get(self._root(node), [node])

    def written(self, node: Node) -> bool:
        """Whether anything in the graph writes to this memory."""
        return self._root(node) in self._written

    def external(self, node: Node) -> bool:
        """Whether the memory may be the caller's or the model's."""
        return any(m.op in EXTERNAL for m in self.members(node))

    def returned(self, node: Node) -> bool:
        """Whether the memory may leave through an output."""
        return any(self._root(out) is self._root(node) for out in self._output.all_input_nodes)


def written_outside(graph: Graph) -> Node | None:
    """A value that the graph writes into and whose memory may be the caller's or the model's."""
    written = [n for node in graph.nodes for n in writes(node)]
    if not written:
        return None
    memory = Memory(graph)
    return next((n for n in written if memory.external(n)), None)


def may_require_grad(graph: Graph, memory: Memory, constant: Iterable[Node] = ()) -> set[Node]:
    """The values that may require gradients when the graph runs with gradients enabled.

    Args:
        graph: the graph.
        memory: its alias classes.
        constant: placeholders known not to require gradients.
    """
    known = set(constant)
    found: set[Node] = set()
    size = -1
    while size != len(found):  # a write can make an earlier alias differentiable
        size = len(found)
        for node in graph.nodes:
            value = node.meta.get("val")
            if value is not None and not any(t.is_floating_point() or t.is_complex() for t in tensors(value)):
                continue
            if node in known or node.target in (aten.detach.default, aten.detach_.default):
                continue
            if node.op == "get_attr":
                owned = attrgetter(str(node.target))(graph.owning_module)
                if isinstance(owned, torch.nn.Parameter) or getattr(owned, "requires_grad", False):
                    found.add(node)
            elif node.op == "placeholder" or any(a in found for a in node.all_input_nodes):
                found.add(node)
                for target in writes(node):
                    found.update(m for m in memory.members(target) if m not in known)
    return found
