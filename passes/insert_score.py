"""A block's scores as a node of the graph: what selections choose by, and what score maps show."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from passes import score
from passes.base import Refusal
from passes.branches import Block
from passes.gather import tokens_first
from passes.layout import Layout
from passes.rules.registry import argument
from passes.splice import splice

_ATTENTION_SCORES = {
    "class-attention": score.class_attention,
    "mean-attention": score.mean_attention,
    "attention-entropy": score.attention_entropy,
}


@dataclass(frozen=True)
class Scoring:
    """How tokens are scored.

    Args:
        operation: whose representation shift: of the MLP, the attention, or the whole block.
        metric, with_skip: the distance, and whether F includes the skip.
        importance: the score, "shift" or a baseline.
    """

    operation: score.Operation = "mlp"
    metric: score.Metric = "l2"
    with_skip: bool = False
    importance: score.Importance = "shift"


def insert_score(graph: Graph, block: Block, layout: Layout, prefix: int, scoring: Scoring) -> Node:
    """Computes a block's scores at the graph's insertion point, behind the block.

    Args:
        layout: of the block's output.
        prefix: how many protected tokens stand in front.

    Returns:
        A node of value [B, N], float32.

    Raises:
        Refusal: the block has no branch or attention op to score by.
    """
    if scoring.importance == "random":
        return splice(graph, "score", lambda x: score.random_score(tokens_first(x, layout)), block.output)
    if scoring.importance != "shift":
        return _attention_score(graph, block, prefix, scoring.importance)
    after, before = _shift_between(block, scoring.operation)

    skip = scoring.with_skip and scoring.operation != "block"

    def shift(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a = a + b if skip else a  # not the block's sum: beside a parallel branch that holds more
        return score.shift(tokens_first(a, layout), tokens_first(b, layout), scoring.metric)

    return splice(graph, "score", shift, after, before)


def _shift_between(block: Block, operation: score.Operation) -> tuple[Node, Node]:
    """F(x) and x."""
    if operation == "block":
        return block.output, block.entry
    branch = block.mlp if operation == "mlp" else block.attention
    if branch is None:
        raise Refusal(
            f"block {block.index} has no attention branch to score by",
            block.output,
            'use Schedule(operation="mlp")',
        )
    return branch.term, branch.stream


def _attention_score(graph: Graph, block: Block, prefix: int, importance: score.Importance) -> Node:
    op = block.attention_op()
    if op is None:
        raise Refusal(
            f"block {block.index} has no single attention op to take a map from",
            block.output,
            'use Schedule(importance="shift"), which needs no attention map',
        )
    if importance == "class-attention" and prefix == 0:
        raise Refusal(
            "class attention needs a class token in front",
            block.output,
            'use Schedule(importance="mean-attention") or "shift"',
        )
    query, key = op.args[:2]
    mask = argument(op, 3, "attn_mask")
    scale = argument(op, 6, "scale")
    fn = _ATTENTION_SCORES[importance]
    if mask is None:
        return splice(graph, "score", lambda q, k: fn(q, k, None, scale), query, key)
    return splice(graph, "score", lambda q, k, m: fn(q, k, m, scale), query, key, mask)
