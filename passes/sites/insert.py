"""Scoring, selection and gather after a block. By itself it changes no result: what was taken out is put back.

`RetargetTokens` then moves the putting back behind the rest of the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from passes.axes.gather import original_positions, take
from passes.axes.token_axis import sequences_per_sample, stream_layout
from passes.graph.base import ALIVE, Check, Pass, PassResult, Refusal
from passes.graph.codes import Code
from passes.graph.layout import Tokens, sequence_in, tokens_in
from passes.graph.splice import splice
from passes.network.branches import Block
from passes.network.padding import insert_padding
from passes.network.protected import Protected
from passes.sites.contract import no_open_site, open_site
from passes.sites.importance import Score, Scored, Selecting, Shift
from passes.sites.select import MANY, centred, keep_highest, protected_mask, way
from passes.sites.site import SITE, Site, put_back


@dataclass(frozen=True)
class InsertSelection(Pass):
    """Puts score, selection and gather after a block.

    Args:
        block: after which; its nodes must be in the graph.
        keep: how many tokens stay, protected ones included.
        protected: which always stay.
        score: by which they are chosen.
        earlier: index nodes of the sites that this sequence already went through.
        sizes: how many of the model's tokens each stands for, [B, N], once some merged.
        size_bias, weighted_mean: see `Site`.
        padded: a mask of the model's inputs may hide tokens, which then leave first (`passes.network.padding`).
    """

    requires: ClassVar[tuple[Check, ...]] = (no_open_site,)
    ensures: ClassVar[tuple[Check, ...]] = (open_site,)

    block: Block
    keep: int
    protected: Protected
    score: Score = Shift()
    earlier: tuple[Node, ...] = ()
    sizes: Node | None = None
    size_bias: bool = True
    weighted_mean: bool = False
    padded: bool = False

    def call(self, gm: GraphModule) -> PassResult:
        stream = self.block.output
        # tokens protected in the middle stay by their score, not by their place
        layout, batch = stream_layout(stream, self.protected.prefix, self.protected.suffix)
        tokens = sequence_in(layout)
        assert tokens is not None
        graph = gm.graph
        users = list(stream.users)
        with graph.inserting_before(stream.next):
            padding, guard = self._padding(gm), self._guard(graph, stream, tokens)
            many = bool(MANY.get(gm)) or sequences_per_sample(stream) > 1
            in_score = self._marks_in_score(stream, tokens, padding, many)
            selecting = Selecting(guard, tokens.dense - self.keep, in_score)
            scores = self.score.insert(Scored(gm, self.block, stream, layout, self.protected.prefix, selecting))
            select = partial(keep_highest, keep=self.keep, lowest=self.score.lowest, many=many)
            index = splice(
                graph, "select", lambda s, g, p: select(s, g, padding=p), scores, None if in_score else guard, padding
            )
            if self.score.centres:
                index = self._centred(graph, stream, index, guard)
            gathered = tuple(d for d, dim in enumerate(layout) if tokens_in(dim))
            short = splice(graph, "gather", lambda x, i: take(x, layout, gathered, {tokens.pieces: i}), stream, index)
            full = put_back(graph, layout, stream, short, index)
            sizes = (
                None if self.sizes is None else splice(graph, "sizes", lambda n, i: n.gather(1, i), self.sizes, index)
            )
        if sizes is not None:
            ALIVE.put(sizes, True)
        for user in users:
            user.replace_input_with(stream, full)
        left = self.keep - self.protected.prefix - self.protected.suffix
        SITE.put(gm, Site(
            stream, full, short, index, layout, batch, left,
            sizes=sizes, size_bias=self.size_bias, weighted_mean=self.weighted_mean,
        ))  # fmt: skip
        return PassResult(gm, rewrites=1)

    def _centred(self, graph: Graph, stream: Node, index: Node, guard: Node) -> Node:
        """The kept positions with the protected token, the class token, in the middle of the others."""
        if self.protected.count != 1:
            raise Refusal(
                f"{self.protected.count} tokens are protected, and this score puts the one that there is in the middle",
                stream,
                "use Schedule(score=TopViM()), which leaves the order as it is",
                code=Code.NO_SCORE,
            )
        return splice(graph, "select", centred, index, guard)

    def _padding(self, gm: GraphModule) -> Node | None:
        return insert_padding(gm, self.block, self.protected.prefix, self.protected.suffix) if self.padded else None

    def _guard(self, graph: Graph, stream: Node, tokens: Tokens) -> Node:
        """Which tokens are protected, [N] or [B, N]."""
        p = self.protected

        def guard(x: Tensor, *earlier: Tensor) -> Tensor:
            positions = original_positions(*earlier) if earlier else None
            return protected_mask(tokens.dense, p.prefix, p.suffix, p.extra, positions, x.device)

        return splice(graph, "select", guard, stream, *(self.earlier if p.extra else ()))

    def _marks_in_score(self, stream: Node, tokens: Tokens, padding: Node | None, many: bool) -> bool:
        """Whether the kernel of the score takes the mask; elsewhere it costs more there, or other scores come first."""
        return self.score.can_mark and padding is None and way(stream.meta["val"].device, tokens.dense, many) != "topk"
