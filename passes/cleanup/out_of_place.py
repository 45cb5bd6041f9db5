"""In-place ops on intermediates become out-of-place ones where nobody can tell the difference."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch.fx import Graph, Node

from passes.graph.aliasing import EXTERNAL, Memory, same_kind, writes
from passes.graph.base import Skip
from passes.graph.splice import fake, fake_mode

aten = torch.ops.aten

# Out-of-place forms that the naming rule below does not find. Random ops have none: theirs lack derivatives.
_WAY_OUT = "it runs as the model wrote it; out of place in the model, x = x.add(y), it would be rewritten"
OUT_OF_PLACE = {
    aten.pow_.Scalar: aten.pow.Tensor_Scalar,
    aten.pow_.Tensor: aten.pow.Tensor_Tensor,
    aten.masked_fill_.Tensor: aten.masked_fill.Tensor,
    aten.hardswish_.default: aten.hardswish.default,
    aten.fill_.Scalar: aten.fill.Scalar,
    aten.fill_.Tensor: aten.fill.Tensor,
    aten.zero_.default: aten.zero.default,
    aten.scatter_.value: aten.scatter.value,
    aten.scatter_.src: aten.scatter.src,
    aten.detach_.default: aten.detach.default,
    aten.copy_.default: aten.clone.default,  # of what is copied from: aten.copy has no derivative
}


def out_of_place(op: Any) -> OpOverload | None:
    """`aten.add.Tensor` for `aten.add_.Tensor`, None where the op is neither pointwise nor in `OUT_OF_PLACE`."""
    if op in OUT_OF_PLACE:
        return OUT_OF_PLACE[op]
    if not isinstance(op, OpOverload) or op.namespace != "aten" or not op._opname.endswith("_"):
        return None
    twin: OpOverload | None = getattr(getattr(aten, op._opname[:-1], None), op._overloadname, None)
    if twin is None or torch.Tag.nondeterministic_seeded in twin.tags or torch.Tag.pointwise not in twin.tags:
        return None
    return twin


def functionalise(graph: Graph) -> tuple[int, list[Skip]]:
    """Makes in-place ops on intermediates out-of-place, in order of execution.

    Returns:
        How many were converted, and a Skip for each that had to stay. Writes to a parameter, a buffer or an
        input itself are neither: they are what the model does.
    """
    converted, skips = 0, []
    memory, order = Memory(graph), {n: i for i, n in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        op = node.target
        target = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        in_place = isinstance(op, OpOverload) and (op is aten.detach_.default or op._schema.is_mutable)
        if not in_place or target is None or target.op in EXTERNAL:
            continue
        reason = _blocked(node, target, memory, order) or _replace(node, target, memory, order)
        if reason:
            skips.append(Skip.at(node, reason, _WAY_OUT))
        else:
            converted += 1
    return converted, skips


def _blocked(node: Node, target: Node, memory: Memory, order: dict[Node, int]) -> str:
    if out_of_place(node.target) is None:
        return "in-place op without a pointwise out-of-place form"
    if not writes(node):  # detach_: only this tensor's autograd record changes
        return ""
    if memory.external(target):
        return "writes through a view of an input, a parameter or a buffer"
    for other in memory.members(target):
        earlier = other not in (target, node) and order[other] < order[node]
        if earlier and any(order[user] > order[node] for user in other.users):
            return f"writes to memory that {other.name} shares and that is read afterwards"
    return ""


def _replace(node: Node, target: Node, memory: Memory, order: dict[Node, int]) -> str:
    """Puts the out-of-place op in `node`'s stead; returns why not."""
    graph, old, twin = node.graph, target.meta.get("val"), out_of_place(node.target)
    assert twin is not None

    def add(op: OpOverload, *args: Any, **kwargs: Any) -> Node:
        new = graph.call_function(op, args, kwargs)
        new.meta = copy.copy(node.meta)
        new.meta["val"] = op(*fake(args), **fake(kwargs))
        order[new] = order[node]
        return new

    args, kwargs = node.args, node.kwargs
    if node.target is aten.copy_.default:
        if not same_kind(fake(args[1]), old):
            return "copy_ broadcasts, or changes device or memory layout"
        args, kwargs = args[1:2], {}
    # the python dispatcher keeps the batch symbolic
    with graph.inserting_before(node), fake_mode(graph), enable_python_dispatcher(), torch.no_grad():
        made = [add(twin, *args, **kwargs)]
        if isinstance(old, torch.Tensor) and made[0].meta["val"].dtype != old.dtype:
            # in place, the result keeps the target's dtype
            made.append(add(aten.to.dtype, made[0], old.dtype))
    new = made[-1]
    if not same_kind(new.meta["val"], old):
        for unused in reversed(made):
            graph.erase_node(unused)
        return "out of place, the result would have another memory layout"
    node.replace_all_uses_with(new)
    target.replace_all_uses_with(new, lambda user: order[user] > order[node])
    memory.join(node, new)
    graph.erase_node(node)
    return ""
