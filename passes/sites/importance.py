"""A score for every token of a block's stream, spliced into the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.fx import GraphModule, Node

from passes.axes.gather import tokens_first
from passes.graph.base import Refusal
from passes.graph.layout import Batch, Layout, expr, tokens_in
from passes.graph.ops import shape_of
from passes.graph.splice import splice
from passes.network.branches import Block
from passes.sites import score
from passes.sites.explicit_attention import write_out

_OF_MAP = {
    "class-attention": score.class_attention,
    "mean-attention": score.mean_attention,
    "attention-entropy": score.attention_entropy,
}


@dataclass(frozen=True)
class Scoring:
    """Which score.

    Args:
        operation: whose representation shift: of the MLP, the attention, or the whole block.
        metric, with_skip: the distance, and whether F includes the skip.
        importance: "shift" or a baseline.
    """

    operation: score.Operation = "mlp"
    metric: score.Metric = "l2"
    with_skip: bool = False
    importance: score.Importance = "shift"

    @property
    def known_after(self) -> Literal["attention", "mlp"]:
        """Behind which branch of a block the score can be computed."""
        if self.importance == "shift":
            return "attention" if self.operation == "attention" else "mlp"
        return "mlp" if self.importance == "top-vim" else "attention"

    def insert(
        self, gm: GraphModule, block: Block, at: Node, layout: Layout, prefix: int, guard: Node | None = None
    ) -> Node:
        """Scores [B, N] in float32, at the graph's insertion point.

        Args:
            at: the stream whose tokens are scored.
            layout: of that stream.
            prefix: tokens that always stay in front.
            guard: of importance "shift": tokens to mark as protected, see `score.shift`.

        Raises:
            Refusal: the block has no such branch, or its attention no map to read.
        """
        if self.importance == "random":
            return splice(gm.graph, "score", lambda x: score.random_score(tokens_first(x, layout)), at)
        if self.importance == "top-vim":
            gated = block.gated()
            if gated is None:
                raise Refusal(
                    f"block {block.index} has no mixer that ends in a linear layer, whose input ToP-ViM scores",
                    block.output,
                    'use Schedule(importance="shift"), which any block has',
                )
            return splice(gm.graph, "score", lambda y: score.mean_activation(tokens_first(y, layout)), gated)
        if self.importance != "shift":
            return self._of_attention(gm, block, layout, prefix)
        after, before = self._between(block)
        _check_every_token(block, at, layout, after, before)
        skip = self.with_skip and self.operation != "block"

        def shift(a: Tensor, b: Tensor, protected: Tensor | None) -> Tensor:
            a = a + b if skip else a  # not the block's sum: beside a parallel branch that holds more
            return score.shift(tokens_first(a, layout), tokens_first(b, layout), self.metric, protected)

        return splice(gm.graph, "score", shift, after, before, guard)

    def _between(self, block: Block) -> tuple[Node, Node]:
        """F(x) and x."""
        if self.operation == "block":
            return block.output, block.entry
        branch = block.mlp if self.operation == "mlp" else block.attention
        if branch is None:
            raise Refusal(
                f"block {block.index} has no attention branch to score by",
                block.output,
                'use Schedule(operation="mlp")',
            )
        return branch.term, branch.stream

    def _of_attention(self, gm: GraphModule, block: Block, layout: Layout, prefix: int) -> Node:
        op = block.attention_op()
        if op is None or not by_sample(op, layout):
            raise Refusal(
                f"block {block.index} has no single attention op to take a map from"
                if op is None
                else f"the attention of block {block.index} is not on [batch, heads, tokens, channels]",
                block.output,
                'use Schedule(importance="shift"), which needs no attention map',
            )
        if self.importance == "class-attention" and prefix == 0:
            raise Refusal(
                "class attention needs a class token in front",
                block.output,
                'use Schedule(importance="mean-attention") or "shift"',
            )
        _check_every_token(block, block.output, layout, block.attention.term if block.attention else op)
        return splice(gm.graph, "score", _OF_MAP[self.importance], write_out(gm, op))


def _check_every_token(block: Block, stream: Node, layout: Layout, *read: Node) -> None:
    """Refuses where a score reads what ran without tokens that are back in the stream."""
    over = [d - len(layout) for d, dim in enumerate(layout) if tokens_in(dim)]
    if any(shape_of(n)[d] != shape_of(stream)[d] for n in read for d in over):
        raise Refusal(
            f"tokens that left before block {block.index} come back inside of it, and not all have a score",
            stream,
            'use Schedule(operation="mlp"), or let tokens leave after another block',
        )


def by_sample(op: Node, layout: Layout) -> bool:
    """Whether an attention op runs over [batch, heads, tokens, channels], not over samples and heads folded into one.

    Args:
        layout: of the stream, which names the batch.
    """
    shape = op.meta["val"].shape
    batch = next((f.size for dim in layout for f in dim if isinstance(f, Batch)), 1)
    return len(shape) == 4 and bool(expr(shape[0]) == batch)
