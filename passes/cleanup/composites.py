"""Ops of other libraries that are made of ATen's (torch's CompositeImplicitAutograd) are written out as these.

An eager call runs the same ATen ops, so nothing changes; the rules for these then serve quantisation of activations,
say. An op that somebody taught with a rule is left as it is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from passes.axes.rules.registry import rule_for
from passes.graph.base import Check, CompileError, Pass, PassResult
from passes.graph.codes import Code
from passes.graph.splice import ORIGIN, splice_all

_TORCHS = ("aten", "prim", "prims", "higher_order")


def no_composite(gm: GraphModule) -> None:
    """No composite op of another library is left."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and _composite(node):
            raise CompileError(f"{node.name} ({node.target}) is not written out", code=Code.FAULT)


@dataclass(frozen=True)
class WriteComposites(Pass):
    """Puts what a composite op of another library does in its place."""

    ensures: ClassVar[tuple[Check, ...]] = (no_composite,)

    def call(self, gm: GraphModule) -> PassResult:
        found = [n for n in gm.graph.nodes if n.op == "call_function" and _composite(n)]
        for node in found:
            _write_out(gm, node)
        return PassResult(gm, rewrites=len(found))


def _composite(node: Node) -> bool:
    op = node.target
    return (
        isinstance(op, OpOverload)
        and op.namespace not in _TORCHS
        and not op._schema.is_mutable
        and torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
        and rule_for(op) is None
        and {*node.all_input_nodes} == {a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node)}
    )


def _write_out(gm: GraphModule, node: Node) -> None:
    op, count, names = node.target, len(node.args), list(node.kwargs)
    assert isinstance(op, OpOverload)

    def call(*given: Any) -> Any:
        return op(*given[:count], **dict(zip(names, given[count:], strict=True)))

    before = set(gm.graph.nodes)
    with gm.graph.inserting_before(node):
        out = splice_all(gm.graph, "", call, *node.args, *node.kwargs.values(), table={op: op.decompose})
    for new in set(gm.graph.nodes) - before:
        new.meta |= {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        ORIGIN.forget(new)
    if isinstance(out, Node):
        node.replace_all_uses_with(out)
        return
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(out[user.args[1]])
