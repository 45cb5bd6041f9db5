"""Score maps of a CNN's stages, and the rows and columns that a schedule leaves (paper, Figure 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.network.patch_grid import PatchGrid, map_grid
from passes.network.stages import Stage
from passes.sites.grid_cut import CUTS, CutGrid
from passes.sites.grid_prune import GridPrune
from passes.sites.importance import Shift
from passes.sites.score_outputs import StageScoreOutputs, ValueOutputs
from rs_compile.optimize import optimize
from rs_compile.schedule import Schedule
from rs_compile.visualize.layers import LayerMaps, Say, SiteMap


def stage_layers(
    gm: GraphModule, stages: Sequence[Stage], chosen: Sequence[int], shift: Shift, schedule: Schedule, images: Tensor
) -> tuple[LayerMaps, ...]:
    """The maps of stages, against what the schedule compares them with; changes the graph to what computes them."""
    grids = [map_grid(gm, stages[i].output) for i in chosen]
    cuts = [CutGrid(stages[i], schedule.grid.get(i, GridPrune()), shift) for i in chosen]
    scores = StageScoreOutputs(tuple(cuts))(gm).gm(images)
    return tuple(
        LayerMaps(i, stages[i].where, grid, values.float().cpu())
        for i, grid, values in zip(chosen, grids, scores, strict=True)
    )


def stage_sites(
    model: nn.Module, images: Tensor, schedule: Schedule, grids: Mapping[int, PatchGrid], say: Say
) -> tuple[SiteMap, ...]:
    """Runs the model as `optimize` rewrites it, and reads which cells its cuts kept.

    All sites are shown on the map of the first stage that is cut: a cell of a later map stands for those cells,
    among what was left, that it has shrunk from.

    Args:
        grids: where the cells of each stage of the schedule lie.
    """
    fast = optimize(model, schedule, backend="eager", progress=say)
    fast(images)
    gm = fast.graph_module()
    cuts = CUTS.of(gm)
    flat = [kept.cpu() for kept in ValueOutputs(tuple(node for pair in cuts.values() for node in pair))(gm).gm(images)]
    grid = grids[min(cuts)]
    now = grid.shape
    # for each cell of the first map the cell of the present one that stands for it, -1 once it has left
    standing = torch.arange(now[0] * now[1]).repeat(len(images), 1)
    sites = []
    for i, r, c in zip(cuts, flat[::2], flat[1::2], strict=True):
        r, c = torch.broadcast_tensors(r, c)
        left = (int(r.shape[1]), int(r.shape[2]))
        whole = (left[0] + schedule.grid[i].rows, left[1] + schedule.grid[i].columns)
        row, column = standing // now[1] * whole[0] // now[0], standing % now[1] * whole[1] // now[1]
        place = torch.full((len(images), whole[0] * whole[1]), -1)
        place.scatter_(1, (r * whole[1] + c).flatten(1), torch.arange(left[0] * left[1]).expand(len(images), -1))
        moved = place.gather(1, (row * whole[1] + column).clamp(min=0))
        standing, now = torch.where(standing >= 0, moved, standing), left
        dense = grids[i].shape
        stands = torch.where(standing >= 0, torch.arange(standing.shape[1]), -1).reshape(-1, *grid.shape)
        sites.append(SiteMap(i, grid, stands, left[0] * left[1], dense[0] * dense[1]))
    return tuple(sites)
