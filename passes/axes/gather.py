"""Taking the kept tokens out of a value of any layout, and putting them back: ordinary PyTorch, to be spliced."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from passes.graph.layout import Batch, Fixed, Layout, Part, Tokens, dim_size, over_samples, sequence_in, tokens_in

Index = Mapping[tuple[Any, ...], Tensor]


def _size(factor: Any, batch: Any) -> Any:
    if isinstance(factor, Batch):
        return batch
    return factor.dense if isinstance(factor, Tokens) else int(factor.size)


def _over_tokens(layout: Layout) -> int:
    return next(d for d, dim in enumerate(layout) if tokens_in(dim))


def along(index: Tensor, rank: int, samples: int | None, tokens: int) -> Tensor:
    """[B, K] laid out over a value of `rank` dimensions, of which two run over samples and tokens."""
    shape = [1] * rank
    if samples is None:
        shape[tokens] = index.shape[1]
        return index.reshape(shape)
    index = index if samples < tokens else index.t()
    shape[samples], shape[tokens] = (index.shape[0], index.shape[1])[:: 1 if samples < tokens else -1]
    return index.reshape(shape)


def take(x: Tensor, target: Layout, gathered: Sequence[int], indices: Index) -> Tensor:
    """Takes each sample's kept tokens along the dimensions `gathered` of `x`.

    Args:
        x: broadcasts to a value with layout `target`; need not have a sample dimension of its own.
        target: layout of that value, at its full length.
        gathered: dimensions of `target` along which x has an entry per token.
        indices: for the pieces of each token factor the kept positions [B, K], in order.

    Returns:
        x at its compact length, with as many dimensions as `target`.
    """
    batch = next(iter(indices.values())).shape[0]
    x = x.reshape([1] * (len(target) - x.dim()) + list(x.shape))
    for tokens in (t for d in gathered if isinstance(t := tokens_in(target[d]), Part)):
        grid = [next(d for d, dim in enumerate(target) if dim == (replace(tokens, at=at),)) for at in (0, 1)]
        x = x.expand([tokens.sizes[grid.index(d)] if d in grid else s for d, s in enumerate(x.shape)])
        rest = [d for d in range(len(target)) if d not in grid]
        last = len(rest)
        taken = take(
            x.movedim(grid, (-2, -1)).flatten(-2),
            (*(target[d] for d in rest), (tokens.whole,)),
            [*(rest.index(d) for d in gathered if d in rest), last],
            indices,
        )
        return taken.unsqueeze(-1).movedim((-2, -1), grid)
    roles: list[Any] = []
    sizes: list[Any] = []
    folds: list[int] = []
    for d, dim in enumerate(target):
        unfold = d in gathered or any(isinstance(f, Batch) for f in dim)
        parts = list(dim) if unfold else [None]
        if len(parts) == 1:
            sizes.append(x.shape[d])
        else:
            sizes += [1 if _is_one(x.shape[d]) else _size(f, batch) for f in parts]
        roles += parts
        folds.append(len(parts))
    x = x.reshape(sizes)
    samples = next((i for i, f in enumerate(roles) if isinstance(f, Batch)), None)
    for i, f in enumerate(roles):
        if not isinstance(f, Tokens) or f.pieces not in indices or _is_one(x.shape[i]):
            continue
        index = along(indices[f.pieces], x.dim(), samples, i)
        spread = [batch if d == samples else s for d, s in enumerate(x.shape)]
        kept = [index.shape[i] if d == i else s for d, s in enumerate(spread)]
        x = torch.gather(x.expand(spread), i, index.expand(kept))
    shape, at = [], 0
    for n, dim in zip(folds, target, strict=True):
        part = list(x.shape[at : at + n])
        if n > 1 and any(isinstance(f, Batch) for f in dim):  # a folded dimension cannot broadcast in part
            part = [s if isinstance(f, Batch | Tokens) else _size(f, batch) for s, f in zip(part, dim, strict=True)]
            x = x.expand([*x.shape[:at], *part, *x.shape[at + n :]])
        shape.append(math.prod(part))
        at += n
    return x.reshape(shape)


def in_place(short: Tensor, layout: Layout, index: Tensor) -> Tensor:
    """A compact value at its full length again: each token in its place, and in those of the others any token.

    Args:
        short: the value.
        layout: of it at full length, over one sequence; its rows and columns each alone.
        index: for each sample the places of the tokens left, [B, K].
    """
    tokens, kept = sequence_in(layout), Tokens((Fixed(index.shape[1]),))
    assert tokens is not None
    numbers = torch.arange(index.shape[1], device=index.device).expand_as(index)
    at = index.new_zeros(index.shape[0], tokens.dense).scatter(1, index, numbers)
    grid = {f.at: (d, f) for d, dim in enumerate(layout) for f in dim if isinstance(f, Part)}
    compact = tuple(
        () if 1 in grid and grid[1][0] == d else tuple(kept if isinstance(f, Tokens) else f for f in dim)
        for d, dim in enumerate(layout)
    )
    full = take(short, compact, [d for d, dim in enumerate(compact) if tokens_in(dim)], {kept.pieces: at})
    if not grid:
        return full
    (rows, part), (columns, _) = grid[0], grid[1]
    rows -= columns < rows
    parts: Tensor = full.squeeze(columns).unflatten(rows, part.sizes)
    return parts.movedim(rows + 1, columns)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _in_row(layout: Layout) -> Layout:
    """The layout of a grid [B, H, W, C] as that of a sequence."""
    tokens = sequence_in(layout)
    return (layout[0], (tokens,) if tokens is not None else (), layout[3])


def tokens_first(x: Tensor, layout: Layout) -> Tensor:
    """A value of a stream's layout as [B, N, ...]: for scores, whatever order the model keeps."""
    if len(layout) == 4:  # on a grid
        return x.flatten(1, 2)
    samples, tokens = over_samples(layout), _over_tokens(layout)
    return x.movedim(tokens, 0).unsqueeze(0) if samples is None else x.movedim((samples, tokens), (0, 1))


def tokens_back(x: Tensor, layout: Layout) -> Tensor:
    """What `tokens_first` made, in the layout's own order again; on a grid they are as many rows."""
    if len(layout) == 4:
        return x.unsqueeze(2 if layout[1] else 1)
    samples, tokens = over_samples(layout), _over_tokens(layout)
    return x.squeeze(0).movedim(0, tokens) if samples is None else x.movedim((0, 1), (samples, tokens))


def put(full: Tensor, short: Tensor, index: Tensor, layout: Layout) -> Tensor:
    """`full` with the kept tokens' values replaced by `short`: what left keeps the value it left with.

    Args:
        full: a value of `layout`, at full length.
        short: the same at its compact length.
        index: kept positions [B, K], in order.
        layout: has one dimension for samples (or none: one sample) and one for tokens, each alone, or is that of a
            grid [B, H, W, C].
    """
    if len(layout) == 4:
        flat = put(full.flatten(1, 2), short.flatten(1, 2), index, _in_row(layout))
        grid: Tensor = flat.unflatten(1, full.shape[1:3])
        return grid
    samples, tokens = over_samples(layout), _over_tokens(layout)
    return full.scatter(tokens, along(index, full.dim(), samples, tokens).expand(short.shape), short)


def spread(short: Tensor, place: Tensor, layout: Layout) -> Tensor:
    """Every token with the value of the one that stands for it.

    Args:
        short: a value of `layout`, at its compact length.
        place: [B, N], for each token a position in `short`.
        layout: has one dimension for samples (or none: one sample) and one for tokens, each alone, or is that of a
            grid [B, H, W, C].
    """
    if len(layout) == 4:
        sizes = [int(dim_size(dim)) for dim in layout[1:3]]
        grid: Tensor = spread(short.flatten(1, 2), place, _in_row(layout)).unflatten(1, sizes)
        return grid
    samples, tokens = over_samples(layout), _over_tokens(layout)
    at = along(place, short.dim(), samples, tokens)
    shape = [place.shape[1] if d == tokens else size for d, size in enumerate(short.shape)]
    return short.gather(tokens, at.expand(shape))


def changed(full: Tensor, short: Tensor, before: Tensor, place: Tensor, layout: Layout) -> Tensor:
    """`full` with each token changed by what the one that stands for it changed by; unchanged, to the bit, by nothing.

    Args:
        full: a value of `layout`, at full length.
        short: the same at its compact length, now.
        before: the same as it was when the others merged into it.
        place, layout: see `spread`.
    """
    wide = torch.promote_types(full.dtype, torch.float32)
    return (full.to(wide) + spread(short.to(wide) - before.to(wide), place, layout)).to(full.dtype)


def or_as_it_left(back: Tensor, full: Tensor, merged: Tensor, layout: Layout) -> Tensor:
    """`back` where a token stayed or merged ([B, N] bool), `full` where it was dropped.

    Args:
        back, full: values of `layout`, at full length; see `spread`.
    """
    if len(layout) == 4:
        return torch.where(merged.unflatten(1, full.shape[1:3]).unsqueeze(-1), back, full)
    return torch.where(along(merged, full.dim(), over_samples(layout), _over_tokens(layout)), back, full)


def stretch_index(index: Tensor, site: Tokens, pieces: Sequence[Any]) -> Tensor:
    """The kept positions of another sequence made of the same prunable stretch.

    Args:
        index: kept positions [B, K] of the pruned sequence.
        site: the pieces of that sequence, which has one prunable stretch.
        pieces: the pieces of the other one.
    """
    before = after = 0
    seen = False
    for piece in site.pieces:
        if not isinstance(piece, Fixed):
            seen = True
        elif seen:
            after += piece.length
        else:
            before += piece.length
    kept = index[:, before : index.shape[1] - after] - before
    parts, at = [], 0
    for piece in pieces:
        if isinstance(piece, Fixed):
            fixed = torch.arange(at, at + piece.length, device=index.device)
            parts.append(fixed.expand(index.shape[0], piece.length))
        else:
            parts.append(kept + at)
        at += piece.length
    return torch.cat(parts, 1)


def original_positions(first: Tensor, *later: Tensor) -> Tensor:
    """Positions [B, K] in the first sequence of what successive selections kept."""
    for index in later:
        first = first.gather(1, index)
    return first
