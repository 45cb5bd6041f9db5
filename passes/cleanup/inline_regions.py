"""Puts the bodies of autocast and no-grad regions back into the graph, where the other passes can see them.

`torch.export` hides what runs in `with torch.autocast(...)` or `with torch.no_grad()` in a subgraph.
Outer regions go first: what a body computes depends on the regions around it, which by then are gone.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from passes.cleanup.autocast import make_casts_explicit
from passes.cleanup.canonicalise import returns_input
from passes.graph.aliasing import EXTERNAL, Memory, bodies, may_require_grad, nodes_in, writes
from passes.graph.base import Pass, PassResult, Skip

aten = torch.ops.aten
_WAY_OUT = "enter autocast, no_grad and enable_grad around the call of the model instead of in its forward"
AUTOCAST = torch.ops.higher_order.wrap_with_autocast
SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled


@dataclass(frozen=True)
class Region:
    """One higher-order op with its subgraph."""

    node: Node

    @property
    def settings(self) -> tuple[Any, ...]:
        """(device type, dtype, enabled, cache) of an autocast, (enabled,) of a gradient switch."""
        return self.node.args[: 4 if self.node.target is AUTOCAST else 1]

    @property
    def enabled(self) -> bool:
        return bool(self.settings[2 if self.node.target is AUTOCAST else 0])

    @property
    def body(self) -> GraphModule:
        return bodies(self.node)[0]

    @property
    def operands(self) -> tuple[Any, ...]:
        return self.node.args[len(self.settings) + 1 :]

    @property
    def inputs(self) -> dict[Node, Any]:
        """Placeholders of the body and what they stand for outside."""
        placeholders = self.body.graph.find_nodes(op="placeholder")
        return dict(zip(placeholders, self.operands, strict=True))

    @property
    def results(self) -> Any:
        """What the body returns: a node, or a tuple of them."""
        return self.body.graph.output_node().args[0]

    def result(self, taken: Node) -> Any:
        """The one of the results that a getitem node takes."""
        index = taken.args[1]
        assert isinstance(index, int)
        return self.results[index]


def regions(gm: GraphModule) -> Iterator[Region]:
    """The autocast and gradient regions at the top level of a graph."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in (AUTOCAST, SET_GRAD):
            yield Region(node)


@dataclass(frozen=True)
class InlineRegions(Pass):
    """Inlines autocast and no-grad regions; values and gradients stay what they were.

    A no-grad region's results are detached as they leave it. An enabled autocast region's casts become ops.

    Args:
        ambient_autocast: the graph will run under autocast; then a region that switches it has to stay.
    """

    ambient_autocast: bool = False

    def call(self, gm: GraphModule) -> PassResult:
        skips: dict[Node, Skip] = {}
        rewrites = 0
        while region := next((r for r in regions(gm) if r.node not in skips), None):
            reason = self._prepare(gm, region)
            if reason:
                skips[region.node] = Skip.at(region.node, reason, _WAY_OUT)
            else:
                _inline(gm, region)
                rewrites += 1
        return PassResult(gm, rewrites, tuple(skips.values()))

    def _prepare(self, gm: GraphModule, region: Region) -> str:
        """Makes the body independent of its region; returns why that is not possible."""
        users_ok = not isinstance(region.results, (tuple, list)) or all(
            user.target is operator.getitem and isinstance(region.result(user), Node) for user in region.node.users
        )
        if not users_ok or region.node.kwargs:
            return "the region's results are used as one value"
        if region.node.target is AUTOCAST:
            if self.ambient_autocast:
                return "the graph runs under autocast, which this region switches"
            if not region.enabled:
                return ""
            device_type, dtype = region.settings[:2]
            return make_casts_explicit(
                region.body,
                {inner: _value(outer) for inner, outer in region.inputs.items()},
                lambda: torch.autocast(device_type, dtype, enabled=True, cache_enabled=False),
            )
        if region.enabled:
            return ""
        if any(inner.enabled for inner in _nested(region.body) if inner.node.target is SET_GRAD):
            return "gradients are switched back on inside a region without gradients"
        written = _differentiable_write(gm, region)
        if written is not None:
            return f"{written.name} writes to memory from outside, which autograd would record"
        _detach_results(region)
        return ""


def _value(argument: Any) -> Any:
    return argument.meta.get("val") if isinstance(argument, Node) else argument


def _nested(gm: GraphModule) -> Iterator[Region]:
    for region in regions(gm):
        yield region
        yield from _nested(region.body)


def _differentiable_write(gm: GraphModule, region: Region) -> Node | None:
    """An op in the body (or below) that autograd would record, or refuse, on memory it must not touch."""
    outside = may_require_grad(gm.graph, Memory(gm.graph))
    return _recorded(region, lambda outer: outer in outside)


def _recorded(region: Region, differentiable: Callable[[Node], bool]) -> Node | None:
    graph = region.body.graph
    memory = Memory(graph)
    constant = [i for i, o in region.inputs.items() if not (isinstance(o, Node) and differentiable(o))]
    tracked = may_require_grad(graph, memory, constant)
    node: Node
    for node in graph.nodes:
        if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
            continue  # batch_norm's statistics are written where autograd does not look
        # autograd also refuses writes to one of several views, which come out of a getitem
        touched = [m for target in writes(node) for m in memory.members(target)]
        foreign = any(m.op in EXTERNAL or m.target is operator.getitem for m in touched)
        if foreign and any(a in tracked for a in node.all_input_nodes):
            return node
    inner = (_recorded(r, lambda outer: outer in tracked) for r in regions(region.body))
    return next((node for node in inner if node is not None), None)


def _origin(node: Node, region: Region) -> Node:
    """The node that made this very tensor object, through ops that return what they are given."""
    while True:
        if returns_input(node):
            node = node.all_input_nodes[0]
        elif node.target is operator.getitem and node.all_input_nodes[0].target in (AUTOCAST, SET_GRAD):
            inner = Region(node.all_input_nodes[0])
            made = _origin(inner.result(node), inner)
            if made.op != "placeholder":
                return node
            node = inner.inputs[made]
        else:
            return node


def _detach_results(region: Region) -> None:
    """Detaches what the region computes; a tensor that only passes through keeps its gradient."""
    output = region.body.graph.output_node()
    detached: dict[Node, Node] = {}

    def leave(node: Any) -> Any:
        val = _value(node)
        floating = isinstance(val, torch.Tensor) and (val.is_floating_point() or val.is_complex())
        if not isinstance(node, Node) or not floating or _origin(node, region).op in EXTERNAL:
            return node
        if node not in detached:
            with region.body.graph.inserting_before(output):
                new = region.body.graph.call_function(aten.detach.default, (node,))
            new.meta = copy.copy(node.meta)
            new.meta["val"] = val.detach()
            detached[node] = new
        return detached[node]

    output.args = map_aggregate(output.args, leave)


def _inline(gm: GraphModule, region: Region) -> None:
    env: dict[Node, Any] = dict(region.inputs)
    with gm.graph.inserting_before(region.node):
        for inner in region.body.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            new = env[inner] = gm.graph.node_copy(inner, lambda n: env[n])
            if inner.op in ("get_attr", "call_module"):
                new.target = _adopt(gm, region.body, str(inner.target))
    if isinstance(region.results, Node):
        region.node.replace_all_uses_with(env[region.results])
    else:
        for user in list(region.node.users):
            user.replace_all_uses_with(env[region.result(user)])
            gm.graph.erase_node(user)
    operands = nodes_in(region.node.args)
    gm.graph.erase_node(region.node)
    for used in dict.fromkeys(n for n in operands if n.op == "get_attr" and not n.users):
        if isinstance(attrgetter(str(used.target))(gm), GraphModule):
            gm.graph.erase_node(used)
            if not gm.graph.find_nodes(op="get_attr", target=str(used.target)):
                gm.delete_submodule(str(used.target))


def _adopt(gm: GraphModule, body: GraphModule, target: str) -> str:
    """Gives the outer module what the body owns, under a name of its own."""
    owner_path, _, leaf = target.rpartition(".")
    owner = body.get_submodule(owner_path)
    value = getattr(owner, leaf)
    name = base = target.replace(".", "_")
    count = 0
    while hasattr(gm, name):
        count += 1
        name = f"{base}_{count}"
    if leaf in owner._buffers:
        gm.register_buffer(name, value, persistent=leaf not in owner._non_persistent_buffers_set)
    else:
        setattr(gm, name, value)  # a Parameter, a submodule or a plain constant: nn.Module sorts them
    return name
