"""Which cells of a map stay, taking them out, and giving a smaller map back at full size: ordinary PyTorch.

Kept cells are a pair of indices (rows, columns) that broadcast to [B, H', W']: [B, H', 1] and [B, 1, W'] where
whole lines leave, both [B, H', W'] where every row and column drops cells of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from passes.sites.score import Metric, shift
from passes.sites.select import keep_highest


def score_map(pairs: Sequence[tuple[Tensor, Tensor]], metric: Metric = "l2") -> Tensor:
    """The representation shift of every cell, summed over pairs: [B, H, W] float32.

    Args:
        pairs: (after, before), each [B, C, H, W].
        metric: distance over the channels.
    """
    flat = [
        shift(after.flatten(2).transpose(1, 2), before.flatten(2).transpose(1, 2), metric) for after, before in pairs
    ]
    grid: Tensor = sum(flat[1:], flat[0]).unflatten(1, pairs[0][0].shape[2:])
    return grid


def _highest(score: Tensor, keep: int, lowest: bool, many: bool) -> Tensor:
    """Positions [B, keep] of the highest scores [B, N], in order."""
    none = torch.zeros(score.shape[1], dtype=torch.bool, device=score.device)
    return keep_highest(score, none, keep, lowest, many=many)


def kept_lines(
    score: Tensor, rows: int, columns: int, rows_first: bool = False, lowest: bool = False, many: bool = False
) -> tuple[Tensor, Tensor]:
    """Whole rows and columns of lowest mean leave (paper, section 4.3, line-wise).

    Args:
        score: [B, H, W].
        rows, columns: how many stay.
        rows_first: a column's mean is that over the rows that stay, not over all.
        lowest: the lowest stay instead (a baseline).
        many: see `select.way`.

    Returns:
        Rows [B, H', 1] and columns [B, 1, W'], ascending; of equal means the earlier line stays.
    """
    if rows == columns and score.shape[1] == score.shape[2] and not rows_first:
        # one mean and one selection for the two
        first = (torch.arange(2, device=score.device) == 0)[:, None, None]
        both = torch.where(first, score.unsqueeze(1), score.transpose(1, 2).unsqueeze(1)).mean(3)
        r, c = _highest(both.flatten(0, 1), rows, lowest, many).unflatten(0, (-1, 2)).unbind(1)
        return r.unsqueeze(2), c.unsqueeze(1)
    r = _highest(score.mean(2), rows, lowest, many)
    if rows_first:
        score = score.gather(1, r.unsqueeze(2).expand(-1, -1, score.shape[2]))
    return r.unsqueeze(2), _highest(score.mean(1), columns, lowest, many).unsqueeze(1)


def kept_cells(score: Tensor, rows: int, columns: int, lowest: bool = False) -> tuple[Tensor, Tensor]:
    """Each row drops its lowest cells and closes up, then each column of what is left does (paper, token-wise).

    Args:
        score: [B, H, W].
        rows, columns: how many stay.
        lowest: the lowest stay instead (a baseline).

    Returns:
        Row and column of each kept cell, both [B, H', W'].
    """
    height = score.shape[1]
    c = _highest(score.flatten(0, 1), columns, lowest, many=True).unflatten(0, (-1, height))
    closed = score.gather(2, c)
    r = _highest(closed.transpose(1, 2).flatten(0, 1), rows, lowest, many=True).unflatten(0, (-1, columns))
    r = r.transpose(1, 2)
    return r, c.gather(1, r)


def take(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The kept cells [B, C, H', W'] of a map [B, C, H, W], in its memory format.

    Args:
        x: the map; one sample may stand for all.
        rows, columns: broadcast to [B, H', W'].
    """
    x = x.expand(rows.shape[0], -1, -1, -1)
    sample = torch.arange(rows.shape[0], device=rows.device)
    if x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1:
        cells = x.permute(0, 2, 3, 1)[sample[:, None, None], rows, columns]
        return cells.permute(0, 3, 1, 2)
    channel = torch.arange(x.shape[1], device=rows.device)
    return x[sample[:, None, None, None], channel[:, None, None], rows.unsqueeze(1), columns.unsqueeze(1)]


def spread(
    x: Tensor,
    rows: Tensor,
    columns: Tensor,
    cut: tuple[int, int],
    size: tuple[int, int],
    step: tuple[int, int],
    start: tuple[float, float],
) -> Tensor:
    """A map that was made from kept cells, at full size: every cell gets the value of the nearest one.

    Where a cell lies is where its window was centred, in rows and columns of the map before the cut.

    Args:
        x: [B, C, h, w], made from the smaller map.
        rows, columns: the kept cells of the map that was cut, broadcast to [B, H', W'].
        cut: the size H, W of that map.
        size: the full size of x.
        step, start: row i of x is centred on row start + i * step of the map that it was made from.
    """
    low, where = x.shape[2:], x.device
    full = [_centres(size[i], step[i], start[i], cut[i], where) for i in (0, 1)]
    if rows.shape[2] == 1:  # whole lines left
        r = _between(rows[:, :, 0].float(), 1, _centres(low[0], step[0], start[0], rows.shape[1], where))
        c = _between(columns[:, 0].float(), 1, _centres(low[1], step[1], start[1], columns.shape[2], where))
        near_row = (full[0][:, None] - r[:, None]).abs().argmin(2)
        near_column = (full[1][:, None] - c[:, None]).abs().argmin(2)
        return take(x, near_row.unsqueeze(2), near_column.unsqueeze(1))
    at = [_centres(low[i], step[i], start[i], rows.shape[1 + i], where) for i in (0, 1)]
    r, c = (_between(_between(place.float(), 1, at[0]), 2, at[1]).flatten(1) for place in (rows, columns))
    y, z = full[0].repeat_interleave(size[1]), full[1].repeat(size[0])
    distance = (y[:, None] - r[:, None]).square() + (z[:, None] - c[:, None]).square()
    nearest = distance.argmin(2).unflatten(1, size)
    return take(x, nearest // low[1], nearest % low[1])


def _centres(count: int, step: int, start: float, length: int, device: torch.device) -> Tensor:
    """Where `count` windows are centred, kept inside 0 to length - 1."""
    return (torch.arange(count, device=device, dtype=torch.float32) * step + start).clamp(0, length - 1)


def _between(values: Tensor, dim: int, at: Tensor) -> Tensor:
    """`values` along `dim` at places that may lie between two entries."""
    low = at.floor()
    part = (at - low).reshape([-1 if d == dim else 1 for d in range(values.dim())])
    a, b = values.index_select(dim, low.long()), values.index_select(dim, at.ceil().long())
    return a + part * (b - a)
