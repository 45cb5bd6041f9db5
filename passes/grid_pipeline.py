"""Rows and columns leave the stages of a convolutional network: the passes in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import GraphModule

from passes.axes.grid import follow_grid
from passes.graph.base import CompileError, Refusal, finish
from passes.graph.codes import Code
from passes.graph.cost import count
from passes.graph.verify import no_stale_shapes
from passes.network.stages import Stage, StageReport, find_stages
from passes.sites.grid_cut import CutGrid
from passes.sites.grid_prune import GridPrune
from passes.sites.importance import Score, Shift
from passes.sites.outcome import Compiled


def cut_stages(
    gm: GraphModule,
    cuts: Mapping[int, GridPrune],
    score: Score = Shift(),
    compact_outputs: bool = False,
    force: bool = False,
) -> Compiled:
    """Cuts one stage after another; each works on the graph that the one before it left.

    Args:
        cuts: by stage, 0-based.
        score, compact_outputs: see `CutGrid`.
        force: insert even where nothing leaves (a test's switch).

    Raises:
        Refusal: a rewrite cannot be proven right.
        CompileError: a stage that is not there, or more rows or columns than it has.
    """
    stages = find_stages(gm)
    check_stages(stages, list(cuts))
    dense = count(gm)
    before = {s.index: dense.between(s.nodes).macs for s in stages}
    left = {}
    for i, cut in sorted(cuts.items()):
        if not (cut.rows or cut.columns or force):
            continue
        stage = stages[i]
        gm = CutGrid(stage, cut, score, compact_outputs).apply(gm).gm
        left[i] = (stage.grid[0] - cut.rows, stage.grid[1] - cut.columns)
    finish(gm, no_stale_shapes)
    cost = count(gm)
    rows = [
        StageReport(
            s,
            s.where,
            int(s.output.meta["val"].shape[1]),
            s.grid,
            left.get(s.index, s.grid),
            before[s.index],
            cost.between(s.nodes).macs,
        )
        for s in stages
    ]
    return Compiled(gm, (), dense, cost, cost.uncounted, tuple(rows))


def check_stages(stages: Sequence[Stage], wanted: Sequence[int]) -> None:
    """Refuses a schedule of stages that are not there."""
    if wanted and not stages:
        raise Refusal(
            "the model has no stage of residual convolutions on [batch, channels, rows, columns]",
            None,
            "where it has residual MLP blocks on tokens, use Schedule(keep={block: ratio}); "
            "rs_compile.explain(model, inputs) shows what was found",
            code=Code.NO_BLOCK,
        )
    for i in wanted:
        if i >= len(stages):
            raise CompileError(
                f"the schedule names stage {i}, but the model has {len(stages)} stages, 0 to {len(stages) - 1}; "
                "rs_compile.explain(model, inputs) lists them",
                code=Code.NO_SUCH_PART,
            )


def cuttable(stage: Stage) -> tuple[bool, str]:
    """Whether rows and columns could leave after this stage, or the reason why not. Changes nothing."""
    try:
        follow_grid(stage.output)
    except Refusal as refusal:
        return False, str(refusal).replace("\n", "; ")
    return True, ""
