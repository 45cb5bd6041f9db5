"""Products that run on every token's place, written out once all sites are in: a later one only narrows the places."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from passes.axes.rules.full_length import FullLength
from passes.graph.base import Pass, PassResult
from passes.graph.splice import replace_by


@dataclass(frozen=True)
class WriteFullLength(Pass):
    """Writes out the ops that a rule put into the graph as `FullLength`."""

    def call(self, gm: GraphModule) -> PassResult:
        found = [node for node in gm.graph.nodes if isinstance(node.target, FullLength)]
        for node in found:
            replace_by(gm, node, "full length", node.target, *node.args)
        return PassResult(gm, rewrites=len(found))
