"""Padding: tokens that nobody attends to, because a mask made of the model's inputs leaves them out as keys.

They go first, and never in the place of a real token. What a mask says is known only when the model runs: padded tokens
are found per sample, in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.axes.rules.pointwise import pointwise
from passes.axes.rules.registry import rule_for
from passes.axes.token_axis import TokenAxis, analyse, stream_layout
from passes.graph.base import Refusal
from passes.graph.codes import Code
from passes.graph.layout import Layout, over_samples, sequence_in, tokens_in
from passes.graph.ops import SOFTMAX, argument, arguments, shape_of, wrap
from passes.graph.splice import splice
from passes.network.branches import LIKE, Block, ancestors

aten = torch.ops.aten
Masking: TypeAlias = tuple[Node, Callable[[Tensor, int], Tensor]]
NEVER = -9000.0  # added to a logit it leaves exp(...) = 0 in every dtype; masks of -10000 are in use


def insert_padding(gm: GraphModule, block: Block, prefix: int = 0, suffix: int = 0) -> Node | None:
    """Which tokens of a block's stream are padding, [B, N] bool, at the graph's insertion point.

    None where the block's attention leaves nobody out: it has no mask, or one that no input of the model is in.

    Args:
        prefix, suffix: so many tokens at either end are protected, and may be told from the others.
    """
    found = masking(gm, block, prefix, suffix)
    if found is None:
        return None
    value, hidden = found
    layout, _ = stream_layout(block.entry)
    samples = over_samples(layout)

    def padding(mask: Tensor, x: Tensor) -> Tensor:
        return hidden(mask, 1 if samples is None else x.shape[samples])

    node: Node = splice(gm.graph, "padding", padding, value, block.entry)
    return node


def hidden_by_mask(mask: Tensor, samples: int) -> Tensor:
    """[B, N] or [1, N], true for keys that a mask [(B | 1), ..., N] of attention shows to no query.

    Args:
        mask: boolean, true where a key is seen, or added to the logits.
        samples: B; it may be folded with heads.
    """
    # a size of one broadcasts
    rows = mask.reshape(1 if isinstance(mask.shape[0], int) and mask.shape[0] == 1 else samples, -1, mask.shape[-1])
    return ~rows.any(1) if mask.dtype == torch.bool else rows.amax(1) <= NEVER


def hidden_by_fill(filled: Tensor, samples: int) -> Tensor:
    """[B, N] or [1, N], true for keys whose logits a mask [(B | 1), ..., N] fills for every query."""
    return hidden_by_mask(~filled.bool(), samples)


def hidden_by_weights(weights: Tensor, samples: int) -> Tensor:
    """[B, N], true for keys that attention weights [B, ..., N] give to no query."""
    return weights.reshape(samples, -1, weights.shape[-1]).amax(1) == 0


def masking(gm: GraphModule, block: Block, prefix: int, suffix: int) -> Masking | None:
    """The value that says who is left out as a key, [..., N], and how it says so.

    Raises:
        Refusal: something of the inputs is in the attention, and what it hides cannot be followed.
    """
    op = block.attention_op()
    if block.attention is None or (op is not None and not isinstance(arguments(op).get("attn_mask"), Node)):
        return None
    above, below = ancestors(gm), _below(block.entry)
    read = {n for node in block.attention.nodes for n in node.all_input_nodes}
    if not any(above[n] & 1 and n not in below for n in read):
        return None  # it reads nothing of the model's inputs but its tokens
    layout, batch = stream_layout(block.entry, prefix, suffix)
    axis = analyse(gm, block.entry, layout, batch, within=block.attention.nodes)
    tokens = sequence_in(layout)

    def over_stream(found: Layout | None, dim: int) -> bool:
        over = tokens_in(found[dim]) if found is not None else None
        return tokens is not None and over is not None and over.same_sequence(tokens)

    def outside(value: object) -> TypeGuard[Node]:
        """Made of the model's inputs, not of the tokens, with an entry per key."""
        if not isinstance(value, Node) or not above[value] & 1 or value in below:
            return False
        return shape_of(value)[-1:] not in ((), (1,))

    if op is not None:
        given = arguments(op)
        mask, keys = given["attn_mask"], axis.layouts.get(given["key"])
        if outside(mask) and keys is None:
            _refuse_unknown(axis, f"call the model without its mask, or {_RULE}")
        return (mask, hidden_by_mask) if outside(mask) and over_stream(keys, -2) else None
    weights = (n for n in gm.graph.nodes if n in block.attention.nodes and n.target in SOFTMAX)
    for node in weights:
        last = wrap(argument(node, "dim"), len(shape_of(node))) == len(shape_of(node)) - 1
        if last and over_stream(axis.layouts.get(node), -1):
            # the weights themselves say less: a query that is padding may attend to everything
            return _written_out(node, outside, axis) or (node, hidden_by_weights)
    if any(outside(value) for node in block.attention.nodes for value in node.all_input_nodes):
        _refuse_unknown(axis, f"{_RULE}; where one of its inputs is a mask, call the model without it")
    return None


_RULE = "register a rule with rs_compile.register_token_rule"


def _refuse_unknown(axis: TokenAxis, way_out: str) -> None:
    """Where the tokens were lost on the way to the keys, who is hidden as a key cannot be told."""
    for node, reason in axis.dense.items():
        raise Refusal(
            f"{reason}, so which tokens the attention behind it hides as padding cannot be told",
            node,
            way_out,
            code=Code.PADDING,
        )


def _below(entry: Node) -> set[Node]:
    """What is computed from the data of a value; its sizes are not data."""
    found, node = {entry}, entry.next
    while node.op != "root":
        data = isinstance(node.meta.get("val"), torch.Tensor | list | tuple) and node.target not in LIKE
        if data and any(n in found for n in node.all_input_nodes):
            found.add(node)
        node = node.next
    return found


def _written_out(softmax: Node, outside: Callable[[object], TypeGuard[Node]], axis: TokenAxis) -> Masking | None:
    """The mask that the logits of a softmax went through."""
    node = softmax.all_input_nodes[0]
    while node in axis.layouts:
        op: Any = getattr(node.target, "overloadpacket", None)
        mask = next(filter(outside, node.all_input_nodes), None)
        if mask is not None:
            fills = op is aten.masked_fill or (op is aten.where and node.args[1] not in axis.layouts)
            shows = op is aten.add or op is aten.where
            return (mask, hidden_by_fill) if fills else (mask, hidden_by_mask) if shows else None
        if rule_for(node.target) is not pointwise:
            return None
        node = node.all_input_nodes[0]
    return None
