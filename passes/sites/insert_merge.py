"""Merging inside or after a block: r tokens become part of the tokens most like them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.axes.gather import original_positions, tokens_back, tokens_first
from passes.axes.token_axis import stream_layout
from passes.graph.base import ALIVE, Pass, PassResult, Refusal
from passes.graph.layout import Layout, expr, sequence_in
from passes.graph.ops import arguments
from passes.graph.splice import splice
from passes.network.branches import Block
from passes.network.protected import Protected
from passes.sites import matching
from passes.sites.importance import Scoring, by_sample
from passes.sites.select import protected_mask
from passes.sites.site import SITE, Restore, Site, put_merged_back

Merger = Literal["stream", "tome", "vid-tldr", "ward"]


def merge_point(block: Block, merger: Merger, scoring: Scoring) -> Node:
    """The stream value that tokens merge in: before the block's attention is added to it, between attention and MLP, or
    after the complete block.

    Raises:
        Refusal: the block has no such place.
    """
    if merger == "stream" or (merger == "vid-tldr" and scoring.known_after == "mlp"):
        return block.output
    if block.attention is None or block.attention.add is block.mlp.add:
        where = "at the inputs of attention, in front of the MLP" if merger == "ward" else "between attention and MLP"
        raise Refusal(
            f"{merger} merges {where}, and block {block.index} has no such place",
            block.output,
            'use Schedule(merger="stream"), which merges after the complete block',
        )
    return block.attention.stream if merger == "ward" else block.attention.add


@dataclass(frozen=True)
class InsertMerge(Pass):
    """Puts matching and merging into a block. By itself it changes no result, unless `restore` is "copy".

    Args:
        block: in which; its nodes must be in the graph.
        r: how many tokens merge away.
        protected: which neither merge nor are merged into.
        merger: "stream" compares the residual stream after the block, "vid-tldr" the stream where it merges, weighing
            sources by `scoring`, "tome" the keys of the block's attention.
        scoring: vid-TLDR's importance.
        restore: see `Site`.
        earlier: index nodes of the sites that this sequence already went through.
        sizes: how many of the model's tokens each stands for, [B, N], once some merged.
        size_bias, weighted_mean: see `Site`.
    """

    block: Block
    r: int
    protected: Protected
    merger: Merger = "stream"
    scoring: Scoring = Scoring()
    restore: Restore = "change"
    earlier: tuple[Node, ...] = ()
    sizes: Node | None = None
    size_bias: bool = True
    weighted_mean: bool = False

    def call(self, gm: GraphModule) -> PassResult:
        graph, p = gm.graph, self.protected
        stream = merge_point(self.block, self.merger, self.scoring)
        layout, batch = stream_layout(stream, p.prefix, p.suffix)
        tokens = sequence_in(layout)
        assert tokens is not None
        users = list(stream.users)
        order: matching.Order = "sequence"
        if self.merger != "stream":
            order = "strength" if self.merger == "tome" and p.prefix == 0 else "even-odd"

        weighs = self.merger == "vid-tldr"

        def merged(
            x: Tensor, keys: Tensor | None, scores: Tensor | None, sizes: Tensor | None, *earlier: Tensor
        ) -> tuple[Tensor, ...]:
            x = tokens_first(x, layout)
            at = original_positions(*earlier) if earlier else None
            guard = protected_mask(tokens.dense, p.prefix, p.suffix, p.extra, at, x.device)
            features = x if keys is None else keys.mean(1)
            matched = matching.match(matching.cosine(features), guard, self.r, p.prefix, p.suffix, order)
            weights = None if scores is None else matching.saliency(scores, guard)
            sizes = torch.ones(x.shape[:2], device=x.device) if sizes is None else sizes
            (short,), sizes = matching.merge([x], sizes, matched, weights)
            return tokens_back(short, layout), sizes, matched.left, matched.place

        with graph.inserting_before(stream.next):
            keys = self._keys(stream, layout) if self.merger == "tome" else None
            scores = self.scoring.insert(gm, self.block, stream, layout, p.prefix) if weighs else None
            earlier = self.earlier if p.extra else ()
            short, sizes, index, place = splice(graph, "merge", merged, stream, keys, scores, self.sizes, *earlier)
            full = put_merged_back(graph, layout, stream, short, short, place, self.restore)
        sizes.meta[ALIVE] = True
        for user in users:
            user.replace_input_with(stream, full)
        left = tokens.dense - self.r - p.prefix - p.suffix
        gm.meta[SITE] = Site(
            stream,
            full,
            short,
            index,
            layout,
            batch,
            left,
            place=place,
            restore=self.restore,
            sizes=sizes,
            size_bias=self.size_bias,
            weighted_mean=self.weighted_mean,
            in_order=order == "sequence",
        )
        return PassResult(gm, rewrites=1)

    def _keys(self, stream: Node, layout: Layout) -> Node:
        """The keys [B, H, N, d] of the block's attention."""
        op = self.block.attention_op()
        keys: Node | None = arguments(op)["key"] if op is not None and by_sample(op, layout) else None
        tokens = sequence_in(layout)
        if keys is None or tokens is None or expr(keys.meta["val"].shape[2]) != tokens.dense:
            raise Refusal(
                f"ToMe compares keys, and block {self.block.index} has no single attention on "
                "[batch, heads, tokens, channels] of its stream",
                stream,
                'use Schedule(merger="stream")',
            )
        return keys
