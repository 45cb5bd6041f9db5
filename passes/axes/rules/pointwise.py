"""Ops that treat every element by itself: broadcast, gather what pairs up with tokens, go on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from passes.axes.rules.registry import Context, MapContext, Transfer, Untransferable, need_free, rules_for
from passes.graph.codes import Code
from passes.graph.layout import (
    Batch,
    Dim,
    Free,
    Layout,
    Line,
    Maps,
    Part,
    Tokens,
    dim_size,
    followed,
    meet,
    tokens_in,
    whole_grids,
)
from passes.graph.ops import ELEMENTWISE, PASS_ON, SHAPED_LIKE, shape_of

aten = torch.ops.aten


def tensors(args: Any) -> list[Node]:
    """The tensor nodes among an op's arguments, in order."""
    found: list[Node] = []

    def add(a: Any) -> Any:
        if isinstance(a, Node) and isinstance(a.meta.get("val"), torch.Tensor) and a not in found:
            found.append(a)
        return a

    map_aggregate(args, add)
    return found


def joined(dims: Sequence[Dim]) -> Dim | None:
    """The dimension that these broadcast to where one of them runs over tokens, rows, columns or samples."""
    shorter = [d for d in dims if followed(d)]
    if shorter:
        first = shorter[0]
        weights = False
        for other in shorter:
            a, b = followed(first), followed(other)
            assert a is not None and b is not None
            if not meet(a, b):
                raise Untransferable(a.named.apart, code=Code.OTHER_SEQUENCE)
            if len(first) != len(other) or not all(map(meet, first, other)):
                raise Untransferable(f"{a.named.many} are folded with different dimensions", code=Code.OTHER_SEQUENCE)
            weights |= any(isinstance(f, Tokens) and f.weights for f in (a, b))
    if len({_in_row(d) for d in dims if any(not isinstance(f, Free) for f in d)}) > 1:
        raise Untransferable(
            "lets the samples of the batch meet, and each keeps tokens of its own", code=Code.SAMPLES_MEET
        )
    if shorter:
        return tuple(replace(f, weights=weights) if isinstance(f, Tokens) else f for f in first)
    over = [d for d in dims if any(isinstance(f, Batch) for f in d)]
    parted = any(isinstance(f, Maps) and f.parted for d in over for f in d)
    found = next((d for d in over if dim_size(d) != 1), over[0] if over else None)
    return tuple(replace(f, parted=True) if isinstance(f, Maps) else f for f in found) if found and parted else found


def _in_row(dim: Dim) -> Any:
    """How many entries of a dimension follow each other from one sample; None where it does not run over samples."""
    at = next((i for i, f in enumerate(dim) if isinstance(f, Batch)), None)
    return None if at is None else dim_size(dim[at + 1 :])


def broadcast(ctx: Context, inputs: Sequence[Node], shape: Sequence[Any]) -> Layout:
    """The layout of what the inputs broadcast to; inputs that carry tokens decide."""
    carrying = [layout for n in inputs if (layout := ctx.layout(n)) is not None]
    out: list[Dim] = []
    for d, size in enumerate(shape):
        at = d - len(shape)
        dims = [layout[at] for layout in carrying if len(layout) >= -at and layout[at] != ()]
        dim = joined(dims)
        if dim and isinstance(dim[0], Maps) and dim_size(dim) == 1:
            dim = ctx.resized(dim, size, "repeats the")  # one for all
        out.append(dim if dim is not None else ctx.plain(size))
    return tuple(out)


class Ungatherable(Untransferable):
    """An input has an entry per token, and cannot be gathered by what each sample kept."""


def align(ctx: Context, inputs: Sequence[Node], out: Layout) -> dict[Node, Layout]:
    """The inputs that have an entry per token (cell) along a dimension in which they do not carry tokens (lines)."""
    aligned: dict[Node, Layout] = {}
    for n in inputs:
        own = ctx.layout(n)
        shape = shape_of(n)
        for at in range(-len(shape), 0):
            over = followed(out[at])
            if own is not None and own[at] and out[at]:
                joined([own[at], out[at]])
                if (mine := followed(own[at])) and over is None:
                    raise Untransferable(
                        f"{mine.named.many} meet what does not run over them", code=Code.OTHER_SEQUENCE
                    )
            if over is None or (isinstance(shape[at], int) and shape[at] == 1):
                continue
            if own is None or followed(own[at]) is None:
                aligned[n] = out
    if isinstance(ctx, MapContext):
        _check_cut_alike(ctx, inputs, aligned, out)
        return aligned
    parts = [dim for dim in out if isinstance(tokens_in(dim), Part)]
    if aligned and not whole_grids(out):
        raise Ungatherable(
            "an input has an entry per row or column of the tokens' grid, and those left form none",
            code=Code.OTHER_SEQUENCE,
        )
    if aligned and any(len(dim) > 1 for dim in parts):
        raise Ungatherable(
            "an input with an entry per token meets a grid that is folded with another dimension",
            code=Code.OTHER_SEQUENCE,
        )
    if aligned and not any(isinstance(f, Batch) for dim in out for f in dim):
        _check_one_sample(ctx, aligned, out)
    return aligned


def _check_cut_alike(ctx: MapContext, inputs: Sequence[Node], aligned: Collection[Node], out: Layout) -> None:
    """Declines where an input with an entry per cell is no map [B, C, H, W] from before the cut, like the cut one."""
    for n in aligned:
        if ctx.layout(n) is not None:
            raise Untransferable(Line.named.apart, code=Code.OTHER_SEQUENCE)
        if n in ctx.fixed:
            raise Untransferable(
                "meets what was pooled to a fixed grid and given rows and columns again", code=Code.FIXED_GRID
            )
        like = len(out) == 4 and ctx.cut is not None and out[2:] == ctx.cut[1:]
        if not like or shape_of(n)[2:] != tuple(map(dim_size, out[2:])):
            raise Untransferable(
                "meets a value from before the cut, whose rows and columns cannot be matched here",
                code=Code.OTHER_SEQUENCE,
            )
    carrying = [layout for n in inputs if (layout := ctx.layout(n)) is not None and len(layout) == len(out)]
    if aligned and ctx.cut is not None and any(layout[0] != ctx.cut[0] for layout in carrying):
        raise Untransferable(
            "meets a value from before the cut, of which it has not every sample", code=Code.SAMPLES_MEET
        )


def _check_one_sample(ctx: Context, aligned: Collection[Node], out: Layout) -> None:
    """Declines where inputs with an entry per token meet a value without samples, unless there is but one sample."""
    if ctx.batch.size != 1:
        raise Ungatherable(
            "an input with an entry per token has no dimension for samples to be gathered along", code=Code.SAMPLES_MEET
        )
    for n in aligned:
        shape = shape_of(n)
        if sum(shape[at] != 1 and tokens_in(out[at]) is not None for at in range(-len(shape), 0)) > 1:
            raise Untransferable(
                "an input has an entry per pair of tokens, which may keep several images in one sequence apart",
                code=Code.OTHER_SEQUENCE,
            )


@rules_for("pointwise", *ELEMENTWISE, *SHAPED_LIKE, maps=True)
def pointwise(node: Node, ctx: Context) -> Transfer:
    """Elementwise with broadcasting; dropout, casts and copies are the case of one input."""
    val = node.meta["val"]
    values = val if isinstance(val, (tuple, list)) else (val,)
    inputs = tensors((node.args, node.kwargs))
    if any(_like_only(node, n) for n in inputs):
        inputs = inputs[:1]
    out = broadcast(ctx, inputs, values[0].shape)
    if not _still_weights(node, {n for n in inputs if _weighted(ctx.layout(n))}):
        out = tuple(no_weights(dim) for dim in out)
    layouts = tuple(out for _ in values)
    return Transfer(layouts if isinstance(val, (tuple, list)) else out, align(ctx, inputs, out))


def no_weights(dim: Dim) -> Dim:
    """The dimension without the promise that it holds attention weights."""
    return tuple(replace(f, weights=False) if isinstance(f, Tokens) else f for f in dim)


def _weighted(layout: Layout | None) -> bool:
    return any(t.weights for dim in layout or () if (t := tokens_in(dim)))


def _still_weights(node: Node, weighted: set[Node]) -> bool:
    """Whether attention weights come out as such: scaled, masked or mixed, but not shifted or bent."""
    op, args = getattr(node.target, "overloadpacket", None), node.args
    if op is aten.mul:
        return sum(a in weighted for a in args[:2]) == 1
    if op is aten.div:
        return weighted == {args[0]}
    if op in (aten.add, aten.sub):
        return all(a in weighted for a in args[:2])
    if op is aten.masked_fill:
        return bool(args[2] == 0)
    if op is aten.where:
        return all(a in weighted or bool(a == 0) for a in args[1:3])
    return op in PASS_ON


def _like_only(node: Node, other: Node) -> bool:
    """`type_as` reads only its second input's dtype."""
    return node.target is aten.type_as.default and other is not node.args[0]


@rules_for(aten.prelu.default, maps=True)
def prelu(node: Node, ctx: Context) -> Transfer:
    """One slope for every entry, or one for each entry of dimension 1."""
    layout, slopes = ctx.carried(node), node.args[1]
    if ctx.layout(slopes) is not None:
        raise Untransferable(ctx.side, code=Code.OTHER_SEQUENCE)
    if shape_of(slopes) != (1,):
        need_free(layout, [1], "a slope for each entry of what")
    return Transfer(tuple(no_weights(dim) for dim in layout))
