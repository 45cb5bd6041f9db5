"""Merging inside or after a block: r tokens become part of the tokens most like them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.axes.gather import original_positions, tokens_back, tokens_first
from passes.axes.token_axis import stream_layout
from passes.graph.base import ALIVE, Check, CompileError, Pass, PassResult, Refusal
from passes.graph.codes import Code
from passes.graph.layout import Layout, expr, sequence_in
from passes.graph.ops import arguments
from passes.graph.splice import splice_all
from passes.network.branches import Block
from passes.network.protected import Protected
from passes.sites.attention_scores import by_sample
from passes.sites.contract import no_open_site, open_site
from passes.sites.importance import Scored
from passes.sites.mergers import Merger, Merging, Stream
from passes.sites.select import protected_mask
from passes.sites.site import SITE, Site, put_merged_back


@dataclass(frozen=True)
class InsertMerge(Pass):
    """Puts matching and merging into a block. By itself it changes no result, unless it restores copies.

    Args:
        block: in which; its nodes must be in the graph.
        r: how many tokens merge away.
        protected: which neither merge nor are merged into.
        by: `Stream` compares the residual stream after the block, `VidTLDR` the stream where it merges, weighing
            sources by its importance, `ToMe` and `PiToMe` the keys of the block's attention; `DiffRate` ranks the
            tokens by its importance.
        earlier: index nodes of the sites that this sequence already went through.
        sizes: how many of the model's tokens each stands for, [B, N], once some merged.
    """

    requires: ClassVar[tuple[Check, ...]] = (no_open_site,)
    ensures: ClassVar[tuple[Check, ...]] = (open_site,)

    block: Block
    r: int
    protected: Protected
    by: Merger = Stream()
    earlier: tuple[Node, ...] = ()
    sizes: Node | None = None

    def call(self, gm: GraphModule) -> PassResult:
        graph, p = gm.graph, self.protected
        stream, dropped = self.by.point(self.block), self._dropped()
        layout, batch = stream_layout(stream, p.prefix, p.suffix)
        tokens = sequence_in(layout)
        assert tokens is not None
        users = list(stream.users)
        at = Merging(self.block, self.r, dropped, p.prefix, p.suffix, tokens.dense - p.count)

        def merged(
            x: Tensor, keys: Tensor | None, scores: Tensor | None, sizes: Tensor | None, *earlier: Tensor
        ) -> tuple[Tensor, ...]:
            x = tokens_first(x, layout)
            where = original_positions(*earlier) if earlier else None
            guard = protected_mask(tokens.dense, p.prefix, p.suffix, p.extra, where, x.device)
            sizes = torch.ones(x.shape[:2], device=x.device) if sizes is None else sizes
            short, sizes, matched = self.by.merged(x, keys, scores, sizes, guard, at)
            return tokens_back(short, layout), sizes, matched.left, matched.place

        with graph.inserting_before(stream.next):
            keys = self._keys(stream, layout) if self.by.reads_keys else None
            by = self.by.scored_by
            scores = by.insert(Scored(gm, self.block, stream, layout, p.prefix)) if by is not None else None
            earlier = self.earlier if p.extra else ()
            short, sizes, index, place = splice_all(graph, "merge", merged, stream, keys, scores, self.sizes, *earlier)
            full = put_merged_back(graph, layout, stream, short, short, place, self.by.restore, dropped > 0)
        ALIVE.put(sizes, True)
        for user in users:
            user.replace_input_with(stream, full)
        left = tokens.dense - self.r - p.prefix - p.suffix
        SITE.put(
            gm,
            Site(
                stream,
                full,
                short,
                index,
                layout,
                batch,
                left,
                place=place,
                drops=dropped > 0,
                restore=self.by.restore,
                sizes=sizes,
                size_bias=self.by.size_bias,
                weighted_mean=self.by.weighted_mean,
                in_order=self.by.order(p.prefix) == "sequence",
            ),
        )
        return PassResult(gm, rewrites=1)

    def _dropped(self) -> int:
        """How many tokens leave without merging."""
        dropped = self.by.drops.get(self.block.index, 0)
        if dropped > self.r:
            raise CompileError(
                f"{type(self.by).__name__} is to drop {dropped} tokens in block {self.block.index}, of {self.r} that "
                "leave there; merge of that block counts both, so write a larger one",
                code=Code.SCHEDULE,
            )
        return dropped

    def _keys(self, stream: Node, layout: Layout) -> Node:
        """The keys [B, H, N, d] of the block's attention."""
        op = self.block.attention_op()
        keys: Node | None = arguments(op)["key"] if op is not None and by_sample(op, layout) else None
        tokens = sequence_in(layout)
        if keys is None or tokens is None or expr(keys.meta["val"].shape[2]) != tokens.dense:
            raise Refusal(
                f"{type(self.by).__name__} compares keys, and block {self.block.index} has no single attention on "
                "[batch, heads, tokens, channels] of its stream",
                stream,
                "use Schedule(by=Stream())",
                code=Code.NO_MERGE,
            )
        return keys
