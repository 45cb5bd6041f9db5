"""A place in the network where tokens leave, as the passes hand it on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from torch.fx import Graph, Node

from passes.axes.gather import changed, or_as_it_left, put, spread, tokens_first
from passes.axes.token_axis import TokenAxis
from passes.graph.facts import Fact
from passes.graph.layout import Batch, Layout, Tokens, sequence_in
from passes.graph.splice import splice

SITE: Fact[Site] = Fact("site")  # of graphs
Restore = Literal["change", "copy"]


@dataclass
class Site:
    """Where tokens leave, pruned or merged into others.

    Args:
        stream: the value that they leave, at full length.
        full: the same value at full length again; what the rest of the network reads until it is retargeted.
        short: the tokens left.
        index: their positions in `stream`, [B, K]; a merged token has the place of its destination.
        layout: of `stream`.
        left: tokens left of the prunable stretch.
        beside: the inputs of an attention that tokens merge at, as it reads them, with their layouts and what is left.
        place: for a merge the position in `short` that now stands for each token of `stream`, [B, N].
        drops: some tokens left without merging; their places in `place` are past the end of `short`.
        restore: what a merged token gets back: "change", its own value in `stream` plus its destination's change since,
            or "copy", its destination's value.
        sizes: how many of the model's tokens each token of `short` stands for, [B, K]; None before any merge.
        in_order: whether the tokens left come in the order that they had in `stream`.
        size_bias, weighted_mean: whether attention and means behind the site use them.
        axis: the token axis from `full` on, once analysed.
        compact: for each value that runs over tokens its compact form, once retargeted.
        restored: for values that were put back their full-length form, once restored.
    """

    stream: Node
    full: Node
    short: Node
    index: Node
    layout: Layout
    batch: Batch
    left: int
    beside: dict[Node, tuple[Layout, Node]] = field(default_factory=dict)
    place: Node | None = None
    drops: bool = False
    restore: Restore = "change"
    sizes: Node | None = None
    size_bias: bool = True
    weighted_mean: bool = False
    in_order: bool = True
    axis: TokenAxis | None = None
    compact: dict[Node, Node] = field(default_factory=dict)
    restored: dict[Node, Node] = field(default_factory=dict)

    @property
    def tokens(self) -> Tokens:
        tokens = sequence_in(self.layout)
        assert tokens is not None
        return tokens

    def carries(self, value: Node) -> bool:
        """Whether a value runs over the tokens that this site left, as its stream does."""
        assert self.axis is not None
        layouts = self.axis.layouts
        return any(twin is value and layouts.get(n) == self.layout for n, twin in self.compact.items())

    def back(self, graph: Graph, short: Node) -> Node:
        """A stream value at full length, at the graph's insertion point."""
        if self.place is None:
            return put_back(graph, self.layout, self.stream, short, self.index)
        return put_merged_back(graph, self.layout, self.stream, short, self.short, self.place, self.restore, self.drops)

    @property
    def stream_is_full(self) -> bool:
        """Whether `full` is `stream`, to the bit."""
        return self.place is None or self.restore == "change"


def put_back(graph: Graph, layout: Layout, stream: Node, short: Node, index: Node) -> Node:
    """Every pruned token back as it was in `stream`."""
    return splice(graph, "restore", lambda x, s, i: put(x, s, i, layout), stream, short, index)


def put_merged_back(
    graph: Graph,
    layout: Layout,
    stream: Node,
    short: Node,
    before: Node,
    place: Node,
    restore: Restore,
    drops: bool = False,
) -> Node:
    """Every merged token back, see `Site`; `before` is what `short` was at the site. A dropped one is as it left."""

    def back(x: Tensor, s: Tensor, b: Tensor, p: Tensor) -> Tensor:
        def merged(place: Tensor) -> Tensor:
            return spread(s, place, layout) if restore == "copy" else changed(x, s, b, place, layout)

        if not drops:
            return merged(p)
        left = tokens_first(s, layout).shape[1]
        return or_as_it_left(merged(p.clamp(max=left - 1)), x, p < left, layout)

    return splice(graph, "restore", back, stream, short, before, place)
