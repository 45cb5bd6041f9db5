"""Scores laid out over the image: what the compiler would choose by, and what a schedule leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from passes.graph.base import CompileError
from passes.graph.codes import Code
from passes.grid_pipeline import check_stages
from passes.network.branches import find_blocks, find_branches
from passes.network.patch_grid import map_grid
from passes.network.stages import find_stages
from passes.pipeline import check_blocks, prepare
from passes.sites.importance import Shift
from rs_compile.errors import named
from rs_compile.schedule import Schedule
from rs_compile.visualize.blocks import block_layers, block_sites, patches
from rs_compile.visualize.layers import Say, ScoreMaps
from rs_compile.visualize.stages import stage_layers, stage_sites


@named("score_maps")
@torch.no_grad()
def score_maps(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[int] | None = None,
    *,
    schedule: Schedule | Mapping[int, float] | None = None,
    shift: Shift = Shift(),
    progress: Say | None = None,
) -> ScoreMaps:
    """Scores of a model's blocks, or of a CNN's stages, over images, by the nodes that `optimize` selects by.

    Args:
        model: a vision model of still images with residual MLP branches, or a CNN with stages; not changed.
        images: as the model wants them, [B, channels, height, width].
        layers: blocks or stages, 0-based, as in `Schedule`; None for all.
        schedule: what is left after each of its sites, by its own score, is in `sites`; None for none.
        shift: the representation shift to show. A stage is compared with what its `GridPrune` says, by the metric.
        progress: called with a line of text at each stage.

    Raises:
        CompileError: a block or stage that does not exist.
        Refusal: the model has neither, or they cannot be traced to rows and columns of the images.
    """
    plan = Schedule.of(schedule) if schedule is not None else Schedule()
    say = progress or (lambda _: None)
    gm = prepare(model, (images,), {}, lower=True, say=say).gm
    size = (int(images.shape[-2]), int(images.shape[-1]))
    blocks, stages = find_blocks(gm), find_stages(gm)
    say("scoring")
    if plan.grid or (stages and not blocks):
        check_stages(stages, list(plan.grid))
        chosen = _chosen(layers, len(stages), "stage")
        grids = {i: map_grid(gm, stages[i].output) for i in plan.grid}  # before the graph is changed
        found = stage_layers(gm, stages, chosen, shift, plan, images)
        sites = stage_sites(model, images, plan, grids, say) if plan.prunes else ()
        return ScoreMaps(size, "stage", f"stage shift, {shift.metric}", found, sites)
    check_blocks(gm, blocks, find_branches(gm), [*plan.keep, *plan.merge] or [0])
    chosen = _chosen(layers, len(blocks), "block")
    grids = {i: patches(gm, blocks[i]) for i in (*plan.keep, *plan.merge)}
    found = block_layers(gm, blocks, chosen, shift, images)
    name = {"mlp": "MLP", "attention": "attention", "block": "block"}[shift.of]
    text = f"{name} shift, {shift.metric}" + (", with skip" if shift.with_skip else "")
    sites = block_sites(model, images, plan, grids, say) if plan.prunes else ()
    return ScoreMaps(size, "block", text, found, sites)


def _chosen(layers: Sequence[int] | None, count: int, unit: str) -> list[int]:
    if layers is None:
        return list(range(count))
    if not layers:
        raise CompileError(f"no layer is asked for; name at least one {unit}, counted from 0", code=Code.NO_SUCH_PART)
    for i in layers:
        if not 0 <= i < count:
            raise CompileError(
                f"layer {i} does not exist: the model has {count} {unit}s, counted from 0 to {count - 1}; "
                "name some of these, or take all",
                code=Code.NO_SUCH_PART,
            )
    return list(layers)
