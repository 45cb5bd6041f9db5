"""A graph that gives scores, or what was kept by them, in place of the model's outputs: to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from passes.axes.gather import original_positions
from passes.axes.token_axis import stream_layout
from passes.graph.base import Pass, PassResult
from passes.graph.splice import splice
from passes.network.branches import Block
from passes.network.protected import Protected
from passes.sites.grid_cut import CutGrid
from passes.sites.importance import Score


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
                scores.append(score.insert(gm, block, block.output, layout, protected.prefix))
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
class KeptOutputs(Pass):
    """Replaces the outputs by the original positions [B, K] of the tokens left after each selection.

    Args:
        selections: by block the selections that its sequence went through (`gm.meta[SELECTIONS]`).
    """

    selections: Mapping[int, tuple[Node, ...]]

    @property
    def changes_outputs(self) -> bool:
        return True

    def call(self, gm: GraphModule) -> PassResult:
        with gm.graph.inserting_before(gm.graph.output_node()):
            kept = [splice(gm.graph, "select", original_positions, *chain) for chain in self.selections.values()]
        _give(gm, kept)
        return PassResult(gm, rewrites=len(kept))


@dataclass(frozen=True)
class CutOutputs(Pass):
    """Replaces the outputs by the kept rows and columns of cuts, a pair of them a stage (`gm.meta[CUTS]`)."""

    cuts: Mapping[int, tuple[Node, Node]]

    @property
    def changes_outputs(self) -> bool:
        return True

    def call(self, gm: GraphModule) -> PassResult:
        _give(gm, [node for pair in self.cuts.values() for node in pair])
        return PassResult(gm, rewrites=len(self.cuts))


def _give(gm: GraphModule, values: Sequence[Node]) -> None:
    gm.graph.output_node().args = (tuple(values),)
