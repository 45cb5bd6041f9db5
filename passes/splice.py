"""Ordinary PyTorch, traced and put into a graph: nobody assembles aten calls by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from functorch import make_fx
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from passes.propagate import remember

ORIGIN = "rs_compile"  # node.meta key: which piece of new arithmetic a node belongs to
REPLACED = "replaced"  # gm.meta key: an op -> the ops that stand in its place


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The fake mode that the graph was captured in; it owns the batch symbol."""
    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch._subclasses.FakeTensor):
            return val.fake_mode
    raise ValueError("the graph carries no fake tensors; capture it with passes.capture")


def fake(arg: Any) -> Any:
    """Replaces every node in an argument by its fake value."""
    return map_aggregate(arg, lambda a: a.meta["val"] if isinstance(a, Node) else a)


def splice(graph: Graph, origin: str, fn: Callable[..., Any], *args: Any) -> Any:
    """Traces `fn` on the fake values of `args` and copies its ops in at the graph's insertion point.

    Args:
        graph: the graph; set its insertion point first (`with graph.inserting_before(node):`).
        origin: what this arithmetic is ("score", "select", ...), kept in each new node's meta.
        fn: a PyTorch function of tensors, which may close over plain numbers.
        args: nodes or constants, in the order of fn's arguments.

    Returns:
        What fn returns, with nodes in place of tensors.
    """
    nodes = [a for a in args if isinstance(a, Node)]

    def on_nodes(*values: Any) -> Any:
        given = iter(values)
        return fn(*(next(given) if isinstance(a, Node) else a for a in args))

    mode = fake_mode(graph)
    with mode, torch.enable_grad():
        traced = make_fx(on_nodes, pre_dispatch=True)(*(n.meta["val"] for n in nodes))
    env: dict[Node, Any] = {}
    given = iter(nodes)
    for inner in traced.graph.nodes:
        if inner.op == "placeholder":
            env[inner] = next(given)
        elif inner.op == "output":
            return map_aggregate(inner.args[0], lambda a: env[a] if isinstance(a, Node) else a)
        elif inner.op == "call_function":
            env[inner] = copied = graph.node_copy(inner, lambda n: env[n])
            remember(mode, copied.target, fake(copied.args), fake(copied.kwargs), copied.meta.get("val"))
            env[inner].meta[ORIGIN] = origin
        else:
            raise ValueError(f"{origin}: tracing made a {inner.op} node; write constants as factory calls")
    raise AssertionError("a traced graph ends in an output node")


def replace_by(gm: GraphModule, node: Node, origin: str, fn: Callable[..., Any], *args: Any) -> Any:
    """Puts `fn` of `args` in the place of an op, and notes what became of it; see `splice`.

    Returns:
        What fn returns: the first result takes the op's place.
    """
    graph, before = gm.graph, set(gm.graph.nodes)
    with graph.inserting_before(node):
        results = splice(graph, origin, fn, *args)
    out = results[0] if isinstance(results, tuple) else results
    gm.meta.setdefault(REPLACED, {})[node] = [n for n in graph.nodes if n not in before]
    out.meta.update({k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")})
    node.replace_all_uses_with(out)
    return results


def stand_ins(gm: GraphModule, node: Node) -> list[Node]:
    """The ops that stand in an op's place: itself, where nothing replaced it."""
    replaced = gm.meta.get(REPLACED, {})
    return [m for n in replaced[node] for m in stand_ins(gm, n)] if node in replaced else [node]
