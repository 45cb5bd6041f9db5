"""What a graph costs for one sample, counted on the graph itself, so that a rewrite is counted as it is.

Two numbers a node. Multiply-accumulates (MACs): linear, convolution, matrix products, Q K^T and A V of
attention. FLOPs in the convention of fvcore's `FlopCountAnalysis`, which papers print: the MACs plus
5 per element of an affine norm, 2 of an eval BatchNorm, 1 that adaptive average pooling reads;
softmax, activations and adds are free. The rules are in `cost_rules.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils._sympy.functions import FloorDiv
from torch.utils.flop_counter import flop_registry

from passes.graph.base import CompileError, Skip, op_name
from passes.graph.codes import Code
from passes.graph.cost_rules import RULES, CostFn, Count
from passes.graph.ops import checked_operator

__all__ = ["Cost", "Count", "count", "register_cost"]

# higher-order operators that run their one subgraph exactly once
_WAY_OUT = "give it one with rs_compile.register_cost; results are right without it, and the sums too low"
_RUN_ONCE = {
    "wrap",
    "wrap_with_autocast",
    "wrap_with_set_grad_enabled",
    "invoke_subgraph",
    "tag_activation_checkpoint",
}
# products inside one op, which PyTorch's own flop counter does not know either
_HEAVY = {"bilinear", "gru", "lstm", "rnn_relu", "rnn_tanh", "_native_multi_head_attention"}
_HEAVY |= {"_transformer_encoder_layer_fwd", "_scaled_dot_product_fused_attention_overrideable"}
_FREE_NAMESPACES = {"aten", "prim", "prims", "inductor", "export"}  # export: reads a part of a quantised weight


@dataclass(frozen=True)
class Cost:
    """The cost of a graph at batch 1.

    Args:
        by_node: the count of every node of the top-level graph that has one; a higher-order op carries
            the count of its subgraphs. The values sum to the totals.
        uncounted: ops that compute something no rule counts: they stand in the totals as 0.
    """

    by_node: Mapping[Node, Count]
    uncounted: tuple[Skip, ...] = ()

    def between(self, nodes: Iterable[Node]) -> Count:
        """The sum over `nodes`, for example those of one block; a node that costs nothing adds nothing."""
        return sum((self.by_node.get(node, Count()) for node in set(nodes)), Count())

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return sum(count.macs for count in self.by_node.values())

    @property
    def flops(self) -> int:
        """FLOPs of one sample in fvcore's convention: the MACs, and what norms and pooling add."""
        return sum(count.flops for count in self.by_node.values())


def register_cost(op: Any, fn: CostFn) -> None:
    """Teaches the count an op, a custom one or a better rule for a known one.

    Args:
        op: an op (`torch.ops.ns.name`, every overload of it, or one overload), a higher-order op, or
            what `torch.library.custom_op` returned.
        fn: called as fn(out, *args, **kwargs), with the sizes at batch 1 in place of every tensor, a
            tuple of ints; `out` is a tuple of such tuples for an op with several results. Returns the
            MACs, or a `Count` where there are FLOPs that are none.

    Raises:
        TypeError: op is no operator.
    """
    RULES[str(checked_operator(op))] = fn


def count(gm: GraphModule) -> Cost:
    """Counts every node at batch 1, from the fake values that the capture left in `node.meta["val"]`.

    The batch is whatever symbol stands in the first dimension of an input. A batch that is a
    literal in the graph is counted as it stands.

    Raises:
        CompileError: an operand of a counted op carries no fake value.
    """
    batch = {
        symbol
        for node in gm.graph.find_nodes(op="placeholder")
        if isinstance(val := node.meta.get("val"), torch.Tensor) and val.dim()
        for symbol in _symbols(val.shape[0])
    }
    return _count(gm, dict.fromkeys(batch, sympy.Integer(1)))


class _UnknownSize(Exception):
    """A size depends on a symbol that is not the batch."""


def _count(gm: GraphModule, batch: dict[sympy.Symbol, sympy.Integer]) -> Cost:
    by_node: dict[Node, Count] = {}
    uncounted: list[Skip] = []
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_module"):
            continue
        rule = _rule(node.target)
        if rule is not None:
            try:
                found = _apply(rule, gm, node, batch)
            except _UnknownSize as error:
                uncounted.append(
                    Skip.at(node, f"{op_name(node)} counts as 0: its size {error} is not the batch's", _WAY_OUT)
                )
                continue
            if found != Count():
                by_node[node] = found
        elif inner := [_count(sub, batch) for sub in _subgraphs(gm, node)]:
            if _name(node) == "cond":  # one branch runs; count the dearer
                inner = [max(inner, key=lambda cost: cost.flops)]
            elif node.op == "call_function" and (len(inner) > 1 or _name(node) not in _RUN_ONCE):
                uncounted.append(_skip(node))
                continue
            uncounted += inner[0].uncounted
            if found := inner[0].between(inner[0].by_node):
                by_node[node] = found
        elif _computes(node):
            uncounted.append(_skip(node))
    return Cost(by_node, tuple(uncounted))


def _rule(target: Any) -> CostFn | None:
    if isinstance(target, OpOverload):
        return RULES.get(str(target)) or RULES.get(str(target.overloadpacket))
    if isinstance(target, OpOverloadPacket):
        return RULES.get(str(target)) or RULES.get(f"{target}.default")
    return RULES.get(str(target)) if isinstance(target, HigherOrderOperator) else None


def _apply(rule: CostFn, gm: GraphModule, node: Node, batch: dict[sympy.Symbol, sympy.Integer]) -> Count:
    args, kwargs = _positional(node)

    def sizes(value: Any) -> Any:
        return _sizes(gm, value, batch)

    found = rule(sizes(node), *map_aggregate(args, sizes), **map_aggregate(kwargs, sizes))
    found = found if isinstance(found, Count) else Count(macs=found)
    return Count(round(found.macs), round(found.other))


def _positional(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments in the schema's order, whichever way the graph spells them."""
    args, kwargs = list(node.args), dict(node.kwargs)
    target = getattr(node.target, "default", node.target)
    if kwargs and isinstance(target, OpOverload):
        for argument in target._schema.arguments[len(args) :]:
            if argument.kwarg_only or not kwargs:
                break
            args.append(kwargs.pop(argument.name, argument.default_value))
    return tuple(args), kwargs


def _sizes(gm: GraphModule, value: Any, batch: dict[sympy.Symbol, sympy.Integer]) -> Any:
    """A node's sizes in place of the node: a tuple of ints, an int for a symbolic number."""
    if isinstance(value, Node):
        val = value.meta.get("val")
        if val is None and value.op == "get_attr":
            val = operator.attrgetter(str(value.target))(gm)
        if val is None:
            raise CompileError(
                f"cannot count: {value.name} carries no fake value; capture the model again, "
                'or give the nodes that a pass inserts their meta["val"]',
                code=Code.FAULT,
            )
        return _sizes(gm, val, batch)
    if isinstance(value, torch.Tensor):
        return tuple(_size(size, batch) for size in value.shape)
    if isinstance(value, torch.SymInt):
        return _size(value, batch)
    if isinstance(value, (tuple, list)):
        return tuple(_sizes(gm, item, batch) for item in value)
    return value


def _size(size: int | torch.SymInt, batch: dict[sympy.Symbol, sympy.Integer]) -> int | Fraction:
    if isinstance(size, int):
        return size
    # a model that takes its samples in groups (the frames of clips): one sample is a part of a group
    share = sympy.sympify(size.node.expr).replace(FloorDiv, lambda a, b: a / b)
    at_one = share.xreplace(batch)
    if at_one.free_symbols:
        raise _UnknownSize(at_one)
    return int(at_one) if at_one.is_Integer else Fraction(at_one.p, at_one.q)


def _symbols(size: int | torch.SymInt) -> set[sympy.Symbol]:
    return set() if isinstance(size, int) else size.node.expr.free_symbols


def _subgraphs(gm: GraphModule, node: Node) -> Iterator[GraphModule]:
    names = [str(node.target)] if node.op == "call_module" else []
    if isinstance(node.target, HigherOrderOperator):
        names = [str(arg.target) for arg in node.all_input_nodes if arg.op == "get_attr"]
    for name in names:
        if isinstance(sub := operator.attrgetter(name)(gm), GraphModule):
            yield sub


def _name(node: Node) -> str:
    target = node.target
    return target.name() if isinstance(target, HigherOrderOperator) else str(target)


def _computes(node: Node) -> bool:
    """Whether a node without a rule may hold multiply-accumulates."""
    target = node.target
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        packet = target.overloadpacket if isinstance(target, OpOverload) else target
        namespace, _, name = str(packet).partition(".")
        if namespace in _FREE_NAMESPACES:
            return packet in flop_registry or name in _HEAVY
    elif target is operator.getitem:
        return False
    val = node.meta.get("val")
    return any(isinstance(item, torch.Tensor) for item in (val if isinstance(val, (tuple, list)) else (val,)))


def _skip(node: Node) -> Skip:
    return Skip.at(node, f"{op_name(node)} counts as 0: no rule counts it", _WAY_OUT)
