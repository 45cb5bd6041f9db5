"""Attention written out as softmax(Q K^T) V: where a baseline reads its map, or everywhere, as papers run it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph.base import Check, CompileError, Pass, PassResult, Refusal
from passes.graph.codes import Code
from passes.graph.facts import Fact
from passes.graph.ops import SDPA, arguments
from passes.graph.splice import replace_by
from passes.sites.sizes import KEY_SIZES, with_bias

MAP: Fact[tuple[Node, Node]] = Fact("attention map")  # of nodes: without size bias, and with it


def no_attention_op(gm: GraphModule) -> None:
    """No attention is left as one op."""
    if gm.graph.find_nodes(op="call_function", target=SDPA):
        raise CompileError("an attention is not written out", code=Code.FAULT)


@dataclass(frozen=True)
class ExplicitAttention(Pass):
    """Writes out every attention that is still one op."""

    ensures: ClassVar[tuple[Check, ...]] = (no_attention_op,)

    def call(self, gm: GraphModule) -> PassResult:
        ops = list(gm.graph.find_nodes(op="call_function", target=SDPA))
        for op in ops:
            write_out(gm, op)
        return PassResult(gm, rewrites=len(ops))


def write_out(gm: GraphModule, op: Node, size_bias: bool = False) -> Node:
    """Replaces an attention op by its arithmetic and returns its map [B, H, Nq, Nk].

    An op that was written out before gives the map that it has.

    Args:
        op: the attention op.
        size_bias: return the map that the values are mixed by, in which merged tokens count for what they stand for.

    Raises:
        Refusal: attention with dropout, whose map is random.
    """
    if MAP.known(op):
        return MAP.of(op)[size_bias]
    given: dict[str, Any] = arguments(op)
    if given["dropout_p"]:
        raise Refusal(
            "attention with dropout has no one map to read", op, "call model.eval() first", code=Code.TRAIN_MODE
        )

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if given["enable_gqa"]:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        logits = attention_logits(query, key, mask, given["scale"], given["is_causal"])
        plain = logits.softmax(-1)
        weights = plain if sizes is None else with_bias(logits, sizes).softmax(-1)
        # a mask of size bias is float32 on CPU, and so are the weights then
        return weights.to(value.dtype) @ value, plain, weights

    inputs = (given["query"], given["key"], given["value"], given["attn_mask"], KEY_SIZES.get(op))
    MAP.put(op, replace_by(gm, op, "attention", attend, *inputs)[1:])
    return write_out(gm, op, size_bias)


def attention_logits(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Tensor:
    """Q K^T * scale + mask, [B, H, Nq, Nk] from [B, H, N, d]; scale is 1/sqrt(d) where not given."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = (query * scale) @ key.transpose(-2, -1)
    if causal:
        rows, columns = (torch.arange(n, device=query.device) for n in logits.shape[-2:])
        logits = logits.masked_fill(columns > rows.unsqueeze(-1), -math.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    return logits
