"""Scores laid out over the image: what the compiler would choose tokens by, and what a schedule leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.base import CompileError
from passes.branches import Block, find_blocks, find_branches
from passes.importance import Scoring
from passes.patch_grid import PatchGrid, find_grid
from passes.pipeline import SELECTIONS, check_blocks, prepare, protected_tokens
from passes.protected import Protected
from passes.score import Metric, Operation
from passes.score_outputs import KeptOutputs, ScoreOutputs
from rs_compile.optimize import optimize
from rs_compile.schedule import Schedule

Say = Callable[[str], None]


@dataclass(frozen=True)
class LayerMaps:
    """One block's scores over the images, of the model with nothing pruned.

    Args:
        block: 0-based, as in `Schedule`.
        where: the block's place in the model.
        grid: which pixels a cell stands for.
        shift: representation shift (Eq. 4), [B, rows, columns] float32 on the CPU.
        attention: the attention score beside it, the same shape; None where the block has no attention op.
        attention_kind: "class attention" (Eq. 2) where tokens stand in front, else "mean attention" (Eq. 3).
    """

    block: int
    where: str
    grid: PatchGrid
    shift: Tensor
    attention: Tensor | None
    attention_kind: str


@dataclass(frozen=True)
class SiteMap:
    """Which patches are left after a block of the schedule.

    Args:
        block: 0-based.
        grid: which pixels a cell stands for.
        kept: bool [B, rows, columns] on the CPU.
        tokens: how many tokens are left, protected ones included.
        of: how many there were before the first selection.
    """

    block: int
    grid: PatchGrid
    kept: Tensor
    tokens: int
    of: int


@dataclass(frozen=True)
class ScoreMaps:
    """Maps of a batch of images.

    Args:
        size: height and width of the images in pixels.
        score: what the shift is, in words: "MLP shift, l2".
        layers: in the order asked for.
        sites: in block order; empty without a schedule.
    """

    size: tuple[int, int]
    score: str
    layers: tuple[LayerMaps, ...]
    sites: tuple[SiteMap, ...] = ()


@torch.no_grad()
def score_maps(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[int] | None = None,
    *,
    schedule: Schedule | Mapping[int, float] | None = None,
    operation: Operation = "mlp",
    metric: Metric = "l2",
    with_skip: bool = False,
    progress: Say | None = None,
) -> ScoreMaps:
    """Scores of a model's blocks over images, computed by the nodes that `optimize` selects by.

    Args:
        model: a vision model of still images with residual MLP branches; not changed.
        images: as the model wants them, [B, channels, height, width].
        layers: blocks, 0-based in order of the MLP branches, as in `Schedule`; None for all.
        schedule: tokens leave by it, by its own score; what is left after each site is in `sites`.
        operation, metric, with_skip: the representation shift to show, as in `Schedule`.
        progress: called with a line of text at each stage.

    Raises:
        CompileError: a block that does not exist.
        Refusal: the model has no blocks, or its tokens are no grid of patches of the images.
    """
    scoring = Schedule(operation=operation, metric=metric, with_skip=with_skip)  # checks the words
    say = progress or (lambda _: None)
    with torch._C._DisableAutocast():
        gm = prepare(model, (images,), {}, lower=True, say=say).gm
    blocks = find_blocks(gm)
    chosen = range(len(blocks)) if layers is None else layers
    _check_layers(gm, blocks, chosen)
    plan = Schedule.of(schedule) if schedule is not None else Schedule()
    if plan.merge:
        raise CompileError("which tokens merge cannot be shown yet; leave merge out of the schedule to visualize")
    # before the graph is changed
    grids = {i: _tokens(gm, blocks[i])[1] for i in plan.keep if i < len(blocks)}
    found = {i: _tokens(gm, blocks[i]) for i in chosen}
    wanted, maps = _wanted(blocks, found, scoring)
    gm = ScoreOutputs(tuple(wanted))(gm).gm
    say("scoring")
    values = gm(images)
    result = tuple(
        LayerMaps(
            i,
            blocks[i].where,
            grid,
            over_grid(values[maps[i, "shift"]], grid),
            over_grid(values[maps[i, "attention"]], grid) if (i, "attention") in maps else None,
            _attention_kind(protected)[0],
        )
        for i, (protected, grid) in found.items()
    )
    name = {"mlp": "MLP", "attention": "attention", "block": "block"}[operation]
    text = f"{name} shift, {metric}" + (", with skip" if with_skip else "")
    sites = _sites(model, images, plan, grids, say) if plan.prunes else ()
    return ScoreMaps((images.shape[-2], images.shape[-1]), text, result, sites)


def over_grid(scores: Tensor, grid: PatchGrid) -> Tensor:
    """Scores of tokens [B, N] as a map [B, rows, columns] on the CPU; NaN where a cell has no token."""
    rows, columns = grid.shape
    tokens = [i for i, cell in enumerate(grid.cells) if cell is not None]
    cells = [cell for cell in grid.cells if cell is not None]
    flat = torch.full((scores.shape[0], rows * columns), torch.nan)
    flat[:, cells] = scores[:, tokens].float().cpu()
    return flat.reshape(-1, rows, columns)


def _check_layers(gm: GraphModule, blocks: list[Block], layers: Sequence[int]) -> None:
    if not blocks:
        check_blocks(gm, blocks, find_branches(gm), [0])
    if not layers:
        raise CompileError("no layer is asked for; name at least one block, counted from 0")
    for i in layers:
        if not 0 <= i < len(blocks):
            raise CompileError(
                f"layer {i} does not exist: the model has {len(blocks)} blocks, 0 to {len(blocks) - 1}, counted from 0"
            )


def _tokens(gm: GraphModule, block: Block) -> tuple[Protected, PatchGrid]:
    shape = block.output.meta["val"].shape
    dim = next((d for d, size in enumerate(shape[:2]) if isinstance(size, int)), 1)
    return protected_tokens(gm, block, None), find_grid(gm, block.output, dim)


def _attention_kind(protected: Protected) -> tuple[str, Scoring]:
    if protected.prefix:
        return "class attention", Scoring(importance="class-attention")
    return "mean attention", Scoring(importance="mean-attention")


def _wanted(
    blocks: list[Block], found: Mapping[int, tuple[Protected, PatchGrid]], scoring: Schedule
) -> tuple[list[tuple[Block, Protected, Scoring]], dict[tuple[int, str], int]]:
    """What to score, and at which place among the scores each map stands."""
    wanted: list[tuple[Block, Protected, Scoring]] = []
    places: dict[tuple[int, str], int] = {}
    shift = Scoring(scoring.operation, scoring.metric, scoring.with_skip)
    for i, (protected, _) in found.items():
        places[i, "shift"] = len(wanted)
        wanted.append((blocks[i], protected, shift))
        if blocks[i].attention_op() is not None:
            places[i, "attention"] = len(wanted)
            wanted.append((blocks[i], protected, _attention_kind(protected)[1]))
    return wanted, places


def _sites(
    model: nn.Module, images: Tensor, schedule: Schedule, grids: Mapping[int, PatchGrid], say: Say
) -> tuple[SiteMap, ...]:
    """Runs the model as `optimize` rewrites it, and reads what its selections kept."""
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
