"""Score maps of a transformer's blocks, and the patches that a schedule leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.axes.token_axis import sequences_per_sample
from passes.graph.base import OBSERVER, SHOWN, Pass, PassResult, Refusal
from passes.graph.codes import Code
from passes.network.branches import Block
from passes.network.patch_grid import PatchGrid, find_grid
from passes.network.protected import Protected
from passes.network.prunable import protected_tokens
from passes.pipeline import SELECTIONS
from passes.sites.attention_scores import ClassAttention, MeanAttention
from passes.sites.importance import Score, Shift
from passes.sites.score_outputs import ScoreOutputs, ValueOutputs
from passes.sites.site import SITE, Site
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
    """Runs the model as `optimize` rewrites it, and reads what became of each patch.

    Args:
        grids: the patches of each block of the schedule.
    """
    # what is unread would be cut out of a merge's places
    fast = optimize(model, schedule, backend="eager", drop_unread=False, progress=say)
    with _places() as places:
        fast(images)
    gm = fast.graph_module()
    chains: Mapping[int, tuple[Node, ...]] = SELECTIONS.of(gm)
    wanted = list(dict.fromkeys(n for chain in chains.values() for at in chain for n in (at, places[at]) if n))
    values = {n: v.cpu() for n, v in zip(wanted, ValueOutputs(tuple(wanted))(gm).gm(images), strict=True)}
    sites = []
    for i, chain in chains.items():
        grid = grids[i]
        count = len(grid.cells)
        at = torch.arange(count).expand(len(images), -1)  # the model's position of each token left
        place = at  # for each of the model's tokens the one that stands for it among those left, -1 once it has left
        for index in chain:
            merged = places[index]
            step = _inverse(values[index], at.shape[1]) if merged is None else values[merged]
            step = torch.where(step < values[index].shape[1], step, -1)  # a merger may drop tokens as well
            place = torch.where(place >= 0, step.gather(1, place.clamp(min=0)), -1)
            at = at.gather(1, values[index])
        cells = torch.tensor([-1 if cell is None else cell for cell in grid.cells])
        stands = torch.where(place >= 0, cells[at].gather(1, place.clamp(min=0)), -1)
        sites.append(SiteMap(i, grid, over_grid(stands, grid).long(), at.shape[1], count))
    return tuple(sites)


def _inverse(index: Tensor, count: int) -> Tensor:
    """Kept positions [B, K] as the place among them of each of `count` tokens, -1 of those that left."""
    numbers = torch.arange(index.shape[1]).expand_as(index)
    return torch.full((len(index), count), -1).scatter(1, index, numbers)


@contextmanager
def _places() -> Iterator[dict[Node, Node | None]]:
    """For each selection that is made meanwhile: of a merge, the value with the place of every token; else None."""
    found: dict[Node, Node | None] = {}

    def observe(_: Pass, result: PassResult) -> None:
        site: Site | None = SITE.get(result.gm)
        if site is not None:
            found[site.index] = site.place
            if site.place is not None:
                SHOWN.put(site.place, True)  # a model that reads one token has no other use for it

    token = OBSERVER.set(observe)
    try:
        yield found
    finally:
        OBSERVER.reset(token)
