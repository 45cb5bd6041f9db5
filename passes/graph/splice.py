"""Ordinary PyTorch, traced and put into a graph: nobody assembles aten calls by hand."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from functorch import make_fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from passes.graph.facts import Fact
from passes.graph.fake import Described, LiteralBatch, remember

ORIGIN: Fact[str] = Fact("rs_compile")  # of nodes: which piece of new arithmetic a node belongs to
REPLACED: Fact[dict[Node, list[Node]]] = Fact("replaced")  # of graphs: an op -> the ops that stand in its place


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The fake mode that the graph was captured in; it owns the batch symbol."""
    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch._subclasses.FakeTensor):
            return val.fake_mode
    raise ValueError("the graph carries no fake tensors; capture it with passes.capture.capture")


def fake(arg: Any) -> Any:
    """Replaces every node in an argument by its fake value."""
    return map_aggregate(arg, lambda a: a.meta["val"] if isinstance(a, Node) else a)


Table = Mapping[OpOverload, Callable[..., Any]]


def splice(graph: Graph, origin: str, fn: Callable[..., Any], *args: Any) -> Node:
    """`splice_all` of a function that returns one tensor or size: its node."""
    new = splice_all(graph, origin, fn, *args)
    if not isinstance(new, Node):
        raise TypeError(f"{origin}: expected one node, the function returned {type(new).__name__}")
    return new


def splice_all(
    graph: Graph, origin: str, fn: Callable[..., Any], *args: Any, table: Table = MappingProxyType({})
) -> Any:
    """Traces `fn` on the fake values of `args` and copies its ops in at the graph's insertion point.

    Args:
        graph: the graph; set its insertion point first (`with graph.inserting_before(node):`).
        origin: what this arithmetic is ("score", "select", ...), kept in each new node's meta.
        fn: a PyTorch function of tensors, which may close over plain numbers.
        args: nodes or constants, in the order of fn's arguments.
        table: ops that are traced as what these functions do.

    Returns:
        What fn returns, with nodes in place of tensors.
    """
    nodes = [a for a in args if isinstance(a, Node)]

    def on_nodes(*values: Any) -> Any:
        given = iter(values)
        return fn(*(next(given) if isinstance(a, Node) else a for a in args))

    mode = fake_mode(graph)
    values = _distinct(mode, [n.meta["val"] for n in nodes])
    traced = _on_literals(mode, on_nodes, values, table) or _Traced(_trace(mode, on_nodes, values, table))
    env: dict[Node, Any] = {}
    samples: dict[int, Node] = {}  # multiples of the batch

    def outer(arg: Any) -> Any:
        if isinstance(arg, Node):
            return env[arg]
        count = traced.batch.multiple(arg) if traced.batch is not None else 0
        if traced.batch is not None and count and count not in samples:
            samples[count] = _samples(graph, origin, nodes, traced.batch, count)
        return samples[count] if count else arg

    given = iter(nodes)
    for inner in traced.gm.graph.nodes:
        if inner.op == "placeholder":
            env[inner] = next(given)
        elif inner.op == "output":
            return map_aggregate(inner.args[0], outer)
        elif inner.op == "call_function":
            args_, kwargs_ = map_aggregate(inner.args, outer), map_aggregate(inner.kwargs, outer)
            env[inner] = copied = graph.call_function(inner.target, args_, kwargs_)
            copied.meta = {**inner.meta, "val": traced.values.get(inner, inner.meta.get("val")), ORIGIN.name: origin}
            remember(mode, copied.target, fake(copied.args), fake(copied.kwargs), copied.meta.get("val"))
        else:
            raise ValueError(f"{origin}: tracing made a {inner.op} node; write constants as factory calls")
    raise AssertionError("a traced graph ends in an output node")


@dataclass(frozen=True)
class _Traced:
    """A traced function; on a literal batch, what that is and the nodes' values on the symbol."""

    gm: GraphModule
    batch: LiteralBatch | None = None
    values: Mapping[Node, Any] = field(default_factory=dict)


def _trace(mode: FakeTensorMode, fn: Callable[..., Any], values: list[Any], table: Table) -> GraphModule:
    with mode, torch.enable_grad():
        gm: GraphModule = make_fx(fn, decomposition_table=dict(table), pre_dispatch=True)(*values)
        return gm


def _on_literals(mode: FakeTensorMode, fn: Callable[..., Any], values: list[Any], table: Table) -> _Traced | None:
    """The function traced on a literal batch, or None where its values cannot be read back."""
    batch = LiteralBatch.of(mode, values)
    if batch is None:
        return None
    try:
        gm = _trace(mode, fn, [batch.literal(v) for v in values], table)
        found = {n: batch.symbolic(n.meta["val"]) for n in gm.graph.nodes if _made(n)}
    except ValueError:
        return None
    return _Traced(gm, batch, found)


def _made(node: Node) -> bool:
    return node.op == "call_function" and "val" in node.meta


def _samples(graph: Graph, origin: str, nodes: list[Node], batch: LiteralBatch, count: int) -> Node:
    """A node that is the batch size, so many times."""
    sizes = ((batch.times(s), n, d) for n in nodes for d, s in enumerate(n.meta["val"].shape))
    times, node, at = min(((t, n, d) for t, n, d in sizes if t), key=lambda found: (count % found[0] > 0, found[0]))
    size = graph.call_function(torch.ops.aten.sym_size.int, (node, at))
    size.meta = {"val": batch.batch * times, ORIGIN.name: origin}
    if count % times:  # windows of the samples, where all samples are asked for
        size, times = graph.call_function(operator.floordiv, (size, times)), 1
        size.meta = {"val": batch.batch, ORIGIN.name: origin}
    if count > times:
        size = graph.call_function(operator.mul, (size, count // times))
        size.meta = {"val": batch.batch * count, ORIGIN.name: origin}
    return size


def _distinct(mode: FakeTensorMode, values: list[Any]) -> list[Any]:
    """No value twice: tracing tells them apart by identity."""
    firsts = {id(v): i for i, v in reversed(list(enumerate(values)))}
    return [
        Described.of(v).fresh(mode) if firsts[id(v)] != i and isinstance(v, torch._subclasses.FakeTensor) else v
        for i, v in enumerate(values)
    ]


def replace_by(gm: GraphModule, node: Node, origin: str, fn: Callable[..., Any], *args: Any) -> Any:
    """Puts `fn` of `args` in the place of an op, and notes what became of it; see `splice_all`.

    Returns:
        What fn returns: the first result takes the op's place.
    """
    graph, before = gm.graph, set(gm.graph.nodes)
    with graph.inserting_before(node):
        results = splice_all(graph, origin, fn, *args)
    out = results[0] if isinstance(results, tuple) else results
    REPLACED.first(gm, {})[node] = [n for n in graph.nodes if n not in before]
    out.meta.update({k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")})
    node.replace_all_uses_with(out)
    return results


def stand_ins(gm: GraphModule, node: Node) -> list[Node]:
    """The ops that stand in an op's place: itself, where nothing replaced it."""
    replaced = REPLACED.get(gm) or {}
    return [m for n in replaced[node] for m in stand_ins(gm, n)] if node in replaced else [node]
