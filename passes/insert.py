"""Scoring, selection and gather after a block. By itself it changes no result: what was taken out is put back.

`RetargetTokens` then moves the putting back behind the rest of the network.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from passes import score
from passes.base import Pass, PassResult, Refusal
from passes.branches import Block
from passes.gather import original_positions, put, take, tokens_first
from passes.layout import Batch, Layout, Tokens, tokens_in
from passes.protected import Protected
from passes.rules.registry import argument
from passes.select import keep_highest, protected_mask
from passes.splice import splice
from passes.token_axis import TokenAxis, stream_layout

SITE = "site"  # gm.meta key

_ATTENTION_SCORES = {
    "class-attention": score.class_attention,
    "mean-attention": score.mean_attention,
    "attention-entropy": score.attention_entropy,
}


@dataclass
class Site:
    """Where tokens leave.

    Args:
        stream: the complete block's output, at full length.
        full: the same value after taking out and putting back; what the rest of the network reads.
        short: the kept tokens.
        index: their positions in `stream`, [B, K], ascending.
        layout: of `stream`.
        left: tokens left of the prunable stretch.
        axis: the token axis from `full` on, once analysed.
        compact: for each value that runs over tokens its compact form, once retargeted.
    """

    stream: Node
    full: Node
    short: Node
    index: Node
    layout: Layout
    batch: Batch
    left: int
    axis: TokenAxis | None = None
    compact: dict[Node, Node] = field(default_factory=dict)

    @property
    def tokens(self) -> Tokens:
        return next(t for dim in self.layout if (t := tokens_in(dim)) is not None)


@dataclass(frozen=True)
class InsertSelection(Pass):
    """Puts score, selection and gather after a block.

    Args:
        block: after which; its nodes must be in the graph.
        keep: how many tokens stay, protected ones included.
        protected: which always stay.
        operation: whose representation shift: of the MLP, the attention, or the whole block.
        metric, with_skip: the distance, and whether F includes the skip.
        importance: the score, "shift" or a baseline.
        lowest: keep the lowest scores (a baseline).
        earlier: index nodes of the selections that this sequence already went through.
    """

    block: Block
    keep: int
    protected: Protected
    operation: score.Operation = "mlp"
    metric: score.Metric = "l2"
    with_skip: bool = False
    importance: score.Importance = "shift"
    lowest: bool = False
    earlier: tuple[Node, ...] = ()

    def call(self, gm: GraphModule) -> PassResult:
        stream = self.block.output
        # tokens protected in the middle stay by their score, not by their place
        layout, batch = stream_layout(stream, self.protected.prefix, self.protected.suffix)
        tokens = next(t for dim in layout if (t := tokens_in(dim)) is not None)
        graph = gm.graph
        users = list(stream.users)
        with graph.inserting_before(stream.next):
            scores = self._score(graph, layout)
            index = self._select(graph, scores, tokens)
            gathered = tuple(d for d, dim in enumerate(layout) if tokens_in(dim))
            short = splice(graph, "gather", lambda x, i: take(x, layout, gathered, {tokens.pieces: i}), stream, index)
            full = splice(graph, "restore", lambda x, s, i: put(x, s, i, layout), stream, short, index)
        for user in users:
            user.replace_input_with(stream, full)
        left = self.keep - self.protected.prefix - self.protected.suffix
        gm.meta[SITE] = Site(stream, full, short, index, layout, batch, left)
        return PassResult(gm, rewrites=1)

    def _select(self, graph: torch.fx.Graph, scores: Node, tokens: Tokens) -> Node:
        p = self.protected

        def select(s: torch.Tensor, *earlier: torch.Tensor) -> torch.Tensor:
            positions = original_positions(*earlier) if earlier else None
            mask = protected_mask(tokens.dense, p.prefix, p.suffix, p.extra, positions, s.device)
            return keep_highest(s, mask, self.keep, self.lowest)

        return splice(graph, "select", select, scores, *(self.earlier if p.extra else ()))

    def _score(self, graph: torch.fx.Graph, layout: Layout) -> Node:
        if self.importance == "random":
            return splice(graph, "score", lambda x: score.random_score(tokens_first(x, layout)), self.block.output)
        if self.importance == "top-vim":
            gated = self.block.gated()
            if gated is None:
                raise Refusal(
                    f"block {self.block.index} has no mixer that ends in a linear layer, whose input ToP-ViM scores",
                    self.block.output,
                    'use Schedule(importance="shift"), which any block has',
                )
            return splice(graph, "score", lambda y: score.mean_activation(tokens_first(y, layout)), gated)
        if self.importance != "shift":
            return self._attention_score(graph)
        after, before = self._shift_between()

        skip = self.with_skip and self.operation != "block"

        def shift(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            a = a + b if skip else a  # not the block's sum: beside a parallel branch that holds more
            return score.shift(tokens_first(a, layout), tokens_first(b, layout), self.metric)

        return splice(graph, "score", shift, after, before)

    def _shift_between(self) -> tuple[Node, Node]:
        """F(x) and x."""
        if self.operation == "block":
            return self.block.output, self.block.entry
        branch = self.block.mlp if self.operation == "mlp" else self.block.attention
        if branch is None:
            raise Refusal(
                f"block {self.block.index} has no attention branch to score by",
                self.block.output,
                'use Schedule(operation="mlp")',
            )
        return branch.term, branch.stream

    def _attention_score(self, graph: torch.fx.Graph) -> Node:
        op = self.block.attention_op()
        if op is None:
            raise Refusal(
                f"block {self.block.index} has no single attention op to take a map from",
                self.block.output,
                'use Schedule(importance="shift"), which needs no attention map',
            )
        if self.importance == "class-attention" and self.protected.prefix == 0:
            raise Refusal(
                "class attention needs a class token in front",
                self.block.output,
                'use Schedule(importance="mean-attention") or "shift"',
            )
        query, key = op.args[:2]
        mask = argument(op, 3, "attn_mask")
        scale = argument(op, 6, "scale")
        fn = _ATTENTION_SCORES[self.importance]
        if mask is None:
            return splice(graph, "score", lambda q, k: fn(q, k, None, scale), query, key)
        return splice(graph, "score", lambda q, k, m: fn(q, k, m, scale), query, key, mask)
