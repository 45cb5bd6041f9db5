"""Ward's merging, at the inputs of a block's attention: what adds least to the variance of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.attention.attention_kernel import AUTOCAST
from passes.axes.gather import original_positions, tokens_back, tokens_first
from passes.axes.token_axis import analyse, stream_layout
from passes.graph.base import ALIVE, Check, Pass, PassResult, Refusal
from passes.graph.codes import Code
from passes.graph.layout import Batch, Layout, runs_over_tokens, sequence_in
from passes.graph.ops import arguments
from passes.graph.splice import splice, splice_all
from passes.network.branches import Block
from passes.network.protected import Protected
from passes.sites import matching
from passes.sites.attention_scores import by_sample
from passes.sites.contract import no_open_site, open_site
from passes.sites.importance import Scored, Shift
from passes.sites.mergers import Ward
from passes.sites.select import protected_mask
from passes.sites.site import SITE, Site, put_merged_back


@dataclass(frozen=True)
class InsertWard(Pass):
    """Merges queries, keys, values and the residual stream around them by one place map, into size-weighted means.

    By itself it changes no result, unless it restores copies. What has an entry per token otherwise (a mask, a gate
    on the branch) follows the destination.

    Args:
        block: in which; its nodes must be in the graph.
        r: how many tokens merge away.
        protected: which neither merge nor are merged into.
        before: the block that leads to this one, whose MLP's shift weighs the tokens; None for equal weights.
        since: the site between that MLP and this block, if there is one.
        by: what becomes of the merged tokens.
        earlier, sizes: see `InsertMerge`.
    """

    requires: ClassVar[tuple[Check, ...]] = (no_open_site,)
    ensures: ClassVar[tuple[Check, ...]] = (open_site,)

    block: Block
    r: int
    protected: Protected
    before: Block | None = None
    since: Site | None = None
    by: Ward = Ward()
    earlier: tuple[Node, ...] = ()
    sizes: Node | None = None

    def call(self, gm: GraphModule) -> PassResult:
        graph, p = gm.graph, self.protected
        stream = self.by.point(self.block)
        layout, batch = stream_layout(stream, p.prefix, p.suffix)
        tokens = sequence_in(layout)
        assert tokens is not None and self.block.attention is not None
        op = self._attention(stream, layout)
        inputs: list[Node] = [arguments(op)[name] for name in ("query", "key", "value")]
        layouts = self._layouts(gm, stream, inputs, layout, batch)
        autocast = bool(AUTOCAST.get(gm))
        users = [n for n in stream.users if op < n and n not in self.block.attention.nodes]

        def merged(
            x: Tensor, q: Tensor, k: Tensor, v: Tensor, shift: Tensor | None, sizes: Tensor | None, *earlier: Tensor
        ) -> tuple[Tensor, ...]:
            values = [tokens_first(x, layout), *(t.transpose(1, 2).flatten(2) for t in (q, k, v))]
            sizes = torch.ones(values[0].shape[:2], device=x.device) if sizes is None else sizes
            at = original_positions(*earlier) if earlier else None
            guard = protected_mask(tokens.dense, p.prefix, p.suffix, p.extra, at, x.device)
            near = matching.ward(values[2:], sizes, shift, autocast)
            matched = matching.match(near, guard, self.r, p.prefix, p.suffix, "sequence")
            short, sizes = matching.merge(values, sizes, matched)
            heads = [s.unflatten(2, t.shape[1::2]).transpose(1, 2) for s, t in zip(short[1:], (q, k, v), strict=True)]
            return tokens_back(short[0], layout), *heads, sizes, matched.left, matched.place

        with graph.inserting_before(op):
            shift = self._shift(gm, stream, layout)
            earlier = self.earlier if p.extra else ()
            short, *heads, sizes, index, place = splice_all(
                graph, "merge", merged, stream, *inputs, shift, self.sizes, *earlier
            )
            whole = {n: splice(graph, "merge", torch.ops.aten.alias.default, n) for n in inputs}
            full = put_merged_back(graph, layout, stream, short, short, place, self.by.restore)
        for n in (sizes, *heads):  # read once the network is retargeted
            ALIVE.put(n, True)
        for user in users:
            user.replace_input_with(stream, full)
        for n, stands in whole.items():
            op.replace_input_with(n, stands)
        SITE.put(
            gm,
            Site(
                stream,
                full,
                short,
                index,
                layout,
                batch,
                tokens.dense - self.r - p.prefix - p.suffix,
                beside={whole[n]: (of, h) for n, of, h in zip(inputs, layouts, heads, strict=True)},
                place=place,
                restore=self.by.restore,
                sizes=sizes,
                size_bias=self.by.size_bias,
                weighted_mean=self.by.weighted_mean,
            ),
        )
        return PassResult(gm, rewrites=1)

    def _attention(self, stream: Node, layout: Layout) -> Node:
        op = self.block.attention_op()
        if op is None or not by_sample(op, layout):
            raise self._refused(stream, "has no single attention op on [batch, heads, tokens, channels]")
        return op

    def _layouts(
        self, gm: GraphModule, stream: Node, inputs: Sequence[Node], layout: Layout, batch: Batch
    ) -> list[Layout]:
        """The layouts of queries, keys and values, each of which has an entry for every token of the stream."""
        assert self.block.attention is not None
        axis = analyse(gm, stream, layout, batch, within=self.block.attention.nodes)
        layouts: list[Layout] = []
        for n in inputs:
            of = axis.layouts.get(n, ())
            if len(of) != 4 or of[2] != (sequence_in(layout),) or runs_over_tokens((of[0], of[1], of[3])):
                raise self._refused(n, "attends with queries, keys or values that are not one for each token")
            layouts.append(of)
        return layouts

    def _refused(self, node: Node, reason: str) -> Refusal:
        return Refusal(
            f"Ward merges queries, keys and values, and block {self.block.index} {reason}",
            node,
            "use Schedule(by=Stream()), which merges after the complete block",
            code=Code.NO_MERGE,
        )

    def _shift(self, gm: GraphModule, stream: Node, layout: Layout) -> Node | None:
        """The shift that the MLP before gave the tokens of the stream, [B, N]; of merged ones the destination's."""
        if self.before is None:
            return None
        at = stream if self.since is None else self.since.stream
        shift = Shift().insert(Scored(gm, self.before, at, layout, self.protected.prefix))
        if self.since is None:
            return shift
        return splice(gm.graph, "score", lambda s, i: s.gather(1, i), shift, self.since.index)
