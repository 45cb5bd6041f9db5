"""Products that run on every token's place, written out once all sites are in: a later one only narrows the places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from passes.axes.rules.full_length import FullLength
from passes.graph.base import Check, CompileError, Pass, PassResult
from passes.graph.codes import Code
from passes.graph.splice import replace_by


def no_full_length_op(gm: GraphModule) -> None:
    """No op is left that only this compiler knows."""
    if any(isinstance(node.target, FullLength) for node in gm.graph.nodes):
        raise CompileError("a product that runs on every token's place is not written out", code=Code.FAULT)


@dataclass(frozen=True)
class WriteFullLength(Pass):
    """Writes out the ops that a rule put into the graph as `FullLength`."""

    ensures: ClassVar[tuple[Check, ...]] = (no_full_length_op,)

    def call(self, gm: GraphModule) -> PassResult:
        found = [node for node in gm.graph.nodes if isinstance(node.target, FullLength)]
        for node in found:
            replace_by(gm, node, "full length", node.target, *node.args)
        return PassResult(gm, rewrites=len(found))
