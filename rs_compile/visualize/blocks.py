"""Score maps of a transformer's blocks, and the patches that a schedule leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.axes.token_axis import sequences_per_sample
from passes.graph.base import Refusal
from passes.graph.codes import Code
from passes.network.branches import Block
from passes.network.patch_grid import PatchGrid, find_grid
from passes.network.protected import Protected
from passes.network.prunable import protected_tokens
from passes.pipeline import SELECTIONS
from passes.sites.importance import ClassAttention, MeanAttention, Score, Shift
from passes.sites.score_outputs import KeptOutputs, ScoreOutputs
from rs_compile.optimize import optimize
from rs_compile.schedule import Schedule
from rs_compile.visualize.layers import LayerMaps, Say, SiteMap, over_grid


def block_layers(
    gm: GraphModule, blocks: Sequence[Block], chosen: Sequence[int], shift: Shift, images: Tensor
) -> tuple[LayerMaps, ...]:
    """The maps of blocks; changes the graph to what computes them."""
    grids = {i: patches(gm, blocks[i]) for i in chosen}
    wanted: list[tuple[Block, Protected, Score]] = []
    for i in chosen:
        guard = protected_tokens(gm, blocks[i], None)
        wanted.append((blocks[i], guard, shift))
        if blocks[i].attention_op() is not None:
            wanted.append((blocks[i], guard, ClassAttention() if guard.prefix else MeanAttention()))
    scores = [s.float().cpu() for s in ScoreOutputs(tuple(wanted))(gm).gm(images)]
    layers: dict[int, LayerMaps] = {}
    for (block, _, score), values in zip(wanted, scores, strict=True):
        i, found = block.index, over_grid(values, grids[block.index])
        if score is shift:
            layers[i] = LayerMaps(i, block.where, grids[i], found)
        else:
            kind = score.kind.replace("-", " ")
            layers[i] = LayerMaps(i, block.where, grids[i], layers[i].shift, found, kind)
    return tuple(layers.values())


def patches(gm: GraphModule, block: Block) -> PatchGrid:
    """The patches that a block's tokens are."""
    if (count := sequences_per_sample(block.output)) > 1:
        raise Refusal(
            f"a sample has {count} sequences of tokens (windows, frames), and a map shows one",
            block.output,
            "rs_compile.optimize prunes such a model all the same",
            code=Code.NO_MAP,
        )
    shape = block.output.meta["val"].shape
    dim = next((d for d, size in enumerate(shape[:2]) if isinstance(size, int)), 1)
    return find_grid(gm, block.output, dim)


def block_sites(
    model: nn.Module, images: Tensor, schedule: Schedule, grids: Mapping[int, PatchGrid], say: Say
) -> tuple[SiteMap, ...]:
    """Runs the model as `optimize` rewrites it, and reads what its selections kept.

    Args:
        grids: the patches of each block of the schedule.
    """
    fast = optimize(model, schedule, backend="eager", progress=say)
    fast(images)
    gm = fast.graph_module()
    selections = gm.meta[SELECTIONS]
    sites = []
    for i, positions in zip(selections, KeptOutputs(selections)(gm).gm(images), strict=True):
        grid = grids[i]
        left = torch.zeros(len(images), len(grid.cells)).scatter_(1, positions.cpu(), 1.0)
        sites.append(SiteMap(i, grid, over_grid(left, grid) == 1, positions.shape[1], len(grid.cells)))
    return tuple(sites)
