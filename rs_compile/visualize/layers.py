"""What score maps are made of: a layer's maps, what is left after a site, all of a batch of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from passes.network.patch_grid import PatchGrid

Say = Callable[[str], None]


@dataclass(frozen=True)
class LayerMaps:
    """The scores of one block, or of one stage of a CNN, over the images; nothing is pruned.

    Args:
        index: of the block or stage, 0-based, as in `Schedule`.
        where: its place in the model.
        grid: which pixels a cell stands for.
        shift: representation shift (Eq. 4), [B, rows, columns] float32 on the CPU.
        attention: the attention score beside it, the same shape; None where there is no attention op.
        attention_kind: "class attention" (Eq. 2) where tokens stand in front, else "mean attention" (Eq. 3).
    """

    index: int
    where: str
    grid: PatchGrid
    shift: Tensor
    attention: Tensor | None = None
    attention_kind: str = ""


@dataclass(frozen=True)
class SiteMap:
    """What a schedule leaves after a block or stage.

    Args:
        index: of the block or stage, 0-based.
        grid: which pixels a cell stands for.
        stands: int64 [B, rows, columns] on the CPU: for each cell the one, counted row by row, whose token stands for
            it: itself where its token is left, the one that it merged into, -1 where its token is gone.
        left: how many tokens, protected ones included, or cells of the stage's map are left.
        of: how many there are in the model with nothing pruned.
    """

    index: int
    grid: PatchGrid
    stands: Tensor
    left: int
    of: int

    @property
    def kept(self) -> Tensor:
        """Whether each cell's own token is left, bool [B, rows, columns]."""
        own = torch.arange(self.stands[0].numel()).reshape(self.grid.shape)
        return self.stands == own

    @property
    def others(self) -> int:
        """Tokens that are no cell and always stay: class token, registers."""
        return self.grid.cells.count(None)


@dataclass(frozen=True)
class ScoreMaps:
    """Maps of a batch of images.

    Args:
        size: height and width of the images in pixels.
        unit: what layers and sites are, blocks of tokens or stages of a CNN.
        score: what the shift is, in words: "MLP shift, l2".
        layers: in the order asked for.
        sites: in order; empty without a schedule.
    """

    size: tuple[int, int]
    unit: Literal["block", "stage"]
    score: str
    layers: tuple[LayerMaps, ...]
    sites: tuple[SiteMap, ...] = ()

    @property
    def cells(self) -> str:
        """What leaves, in words."""
        return "tokens" if self.unit == "block" else "cells"


def over_grid(scores: Tensor, grid: PatchGrid) -> Tensor:
    """Scores of tokens [B, N] as a map [B, rows, columns] on the CPU; NaN where a cell has no token."""
    rows, columns = grid.shape
    tokens = [i for i, cell in enumerate(grid.cells) if cell is not None]
    cells = [cell for cell in grid.cells if cell is not None]
    flat = torch.full((scores.shape[0], rows * columns), torch.nan)
    flat[:, cells] = scores[:, tokens].float().cpu()
    return flat.reshape(-1, rows, columns)
