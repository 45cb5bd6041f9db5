"""What became of the nodes that were analysed, while one site after another rewrites the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.fx import Node

from passes.axes.token_axis import Needed
from passes.network.branches import Block, Branch
from passes.sites.site import Site


class Renaming:
    """Follows nodes of the graph before the first site to what stands for them now."""

    def __init__(self, streams: Sequence[Node]) -> None:
        self._streams = streams  # the residual sums at which tokens may come back
        self._now: dict[Node, Node] = {}
        self._back: dict[Node, Node] = {}  # residual sums at which tokens came back, with all of them
        self.needed: dict[Node, Needed] = {}  # the same sums: by what

    def current(self, node: Node) -> Node:
        """The node itself, or its compact form."""
        return self._now.get(node, node)

    def whole(self, node: Node) -> Node:
        """The same, with every token where tokens came back."""
        return self._back.get(node) or self.current(node)

    def of(self, block: Block) -> Block:
        """The block's nodes as earlier sites left them, and as they came back."""

        def branch(b: Branch) -> Branch:
            return replace(
                b,
                stream=self.whole(b.stream),
                term=self.current(b.term),
                add=self.whole(b.add),
                nodes=frozenset(map(self.current, b.nodes)),
            )

        attention = branch(block.attention) if block.attention is not None else None
        return replace(block, mlp=branch(block.mlp), attention=attention)

    def follow(self, site: Site) -> None:
        """Takes in what a site, retargeted and restored, did to the graph."""
        ends = site.axis.ends if site.axis is not None else {}
        for node in self._streams:
            now = self.current(node)
            if now in ends and now in site.restored and node not in self._back:
                self._back[node], self.needed[node] = site.restored[now], ends[now]
        moved = {site.stream: site.short, **site.compact}
        self._now = {n: moved.get(self.current(n), self.current(n)) for n in {*self._now, *moved}}
