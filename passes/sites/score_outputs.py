"""A graph that gives scores, or other values of its own, in place of the model's outputs: to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from passes.axes.token_axis import stream_layout
from passes.graph.base import Pass, PassResult
from passes.network.branches import Block
from passes.network.protected import Protected
from passes.sites.grid_cut import CutGrid
from passes.sites.importance import Score, Scored


@dataclass(frozen=True)
class ScoreOutputs(Pass):
    """Replaces the outputs by scores: for each of `wanted` a [B, N], in float32.

    Args:
        wanted: blocks, the tokens of theirs that are protected, and by what to score.
    """

    wanted: tuple[tuple[Block, Protected, Score], ...]

    @property
    def changes_outputs(self) -> bool:
        return True

    def call(self, gm: GraphModule) -> PassResult:
        scores: list[Node] = []
        for block, protected, score in self.wanted:
            layout, _ = stream_layout(block.output, protected.prefix, protected.suffix)
            with gm.graph.inserting_before(block.output.next):
                scores.append(score.insert(Scored(gm, block, block.output, layout, protected.prefix)))
        _give(gm, scores)
        return PassResult(gm, rewrites=len(scores))


@dataclass(frozen=True)
class StageScoreOutputs(Pass):
    """Replaces the outputs by the score maps of stages: for each cut the [B, H, W] that it would choose by."""

    cuts: tuple[CutGrid, ...]

    @property
    def changes_outputs(self) -> bool:
        return True

    def call(self, gm: GraphModule) -> PassResult:
        scores: list[Node] = []
        for cut in self.cuts:
            with gm.graph.inserting_before(cut.stage.output.next):
                scores.append(cut.insert_score(gm.graph))
        _give(gm, scores)
        return PassResult(gm, rewrites=len(scores))


@dataclass(frozen=True)
class ValueOutputs(Pass):
    """Replaces the outputs by these values of the graph."""

    values: tuple[Node, ...]

    @property
    def changes_outputs(self) -> bool:
        return True

    def call(self, gm: GraphModule) -> PassResult:
        _give(gm, self.values)
        return PassResult(gm, rewrites=len(self.values))


def _give(gm: GraphModule, values: Sequence[Node]) -> None:
    gm.graph.output_node().args = (tuple(values),)
