"""What is of maps alone: ops over rows and columns, and ops whose literal sizes may be those of the map."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from passes.axes.rules.contractions import attention as attention_of_tokens
from passes.axes.rules.reductions import along
from passes.axes.rules.registry import Context, Extent, Transfer, Untransferable, grid_rules_for, need_free
from passes.axes.rules.tokens import select as select_of_tokens
from passes.axes.rules.tokens import slice_ as slice_of_tokens
from passes.graph.codes import Code
from passes.graph.layout import Batch, Layout, Line, lines_in, whole_lines
from passes.graph.ops import RESHAPES, SOFTMAX, argument, arguments, shape_of, view_sizes, wrap
from passes.graph.regroup import regroup

aten = torch.ops.aten

grid_rules_for(*SOFTMAX, aten.log_softmax.int, aten.glu.default, aten.cumsum.default)(along)


@grid_rules_for(aten.batch_norm.default)
def batch_norm(node: Node, ctx: Context) -> Transfer:
    """An affine map of channels from running statistics; in training its statistics are the smaller map's."""
    layout = ctx.carried(node)
    need_free(layout, [1], "batch norm")
    return Transfer(layout, mixes=bool(argument(node, "training")))


@grid_rules_for(aten.group_norm.default)
def group_norm(node: Node, ctx: Context) -> Transfer:
    """Statistics over channels and cells of one sample: the smaller map's."""
    layout = ctx.carried(node)
    need_free(layout, [1], "group norm")
    return Transfer(layout, mixes=True)


@grid_rules_for(aten.slice.Tensor, aten.narrow.default)
def slice_(node: Node, ctx: Context) -> Transfer:
    """Part of the channels, or every n-th row or column from the first to the last."""
    layout = ctx.carried(node)
    d = wrap(argument(node, "dim"), len(layout))
    if not lines_in(layout[d]):
        return slice_of_tokens(node, ctx)
    start, end = argument(node, "start"), argument(node, "end", 0)
    if start not in (None, 0) or end not in (None, torch.iinfo(torch.int64).max):
        raise Untransferable("takes rows or columns by their number", code=Code.NEEDS_THE_MAP)
    line, *folded = lines_in(layout[d])
    step = argument(node, "step")
    if step != 1 and folded:
        raise Untransferable(
            "takes every n-th cell of a map that is folded into one dimension", code=Code.NEEDS_THE_MAP
        )
    if step == 1:
        return Transfer(layout)
    out = replace(line, count=shape_of(node)[d], step=line.step * step)
    return Transfer((*layout[:d], (out,), *layout[d + 1 :]), mixes=True)


@grid_rules_for(aten.select.int)
def select(node: Node, ctx: Context) -> Transfer:
    """One entry of channels or heads, whose dimension goes."""
    layout = ctx.carried(node)
    dim = layout[wrap(argument(node, "dim"), len(layout))]
    if lines_in(dim):
        need_free((dim,), [0], "one entry of a dimension that")
    if any(isinstance(f, Batch) for f in dim):
        raise Untransferable("takes one sample of the batch", code=Code.SAMPLES_MEET)
    return select_of_tokens(node, ctx)


@grid_rules_for(aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default)
def new(node: Node, ctx: Context) -> Transfer:
    """A value of its own, such as the mask of stochastic depth; it must not have a size of the grid."""
    if any(isinstance(s, int) and s != 1 for s in shape_of(node)):
        raise Untransferable("makes a value whose size may be that of the grid", code=Code.FIXED_GRID)
    return Transfer(None)


@grid_rules_for(aten.scaled_dot_product_attention.default)
def attention(node: Node, ctx: Context) -> Transfer:
    """Cells attend to cells, of this map or of one that a window made from it: to those of the smaller map."""
    given: list[Any] = [argument(node, name) for name in ("query", "key", "value")]
    if argument(node, "attn_mask") is not None or argument(node, "is_causal"):
        raise Untransferable(
            "attends by a mask, which may have an entry per cell, or in order", code=Code.NEEDS_THE_MAP
        )
    for layout in map(ctx.layout, given):
        over = layout and [d for d, dim in enumerate(layout) if lines_in(dim)]
        if layout and (over != [len(layout) - 2] or len(lines_in(layout[-2])) != 2):
            raise Untransferable("attends along rows or columns alone, or over channels", code=Code.NEEDS_THE_MAP)
    keys, values = (lines_in(ctx.sides(n)[-2]) for n in given[1:])
    if [line.count for line in keys] != [line.count for line in values]:
        raise Untransferable("takes keys and values of different maps", code=Code.OTHER_SEQUENCE)
    return replace(attention_of_tokens(node, ctx), mixes=True, apart=True)


@grid_rules_for(*RESHAPES)
def view(node: Node, ctx: Context) -> Transfer:
    """Rows and columns folded into one dimension, or out of it; channels and heads in any other way.

    Where their numbers are written, only those of the smaller map fit, whatever the model computes them from.
    """
    layout, shape, out = ctx.carried(node), shape_of(node.args[0]), shape_of(node)
    found = regroup(layout, out)
    args = _written(node, layout, found) if found is not None and whole_lines(found) else None
    if found is None or args is None:
        at = {f.at: d for d, dim in enumerate(layout) for f in dim if isinstance(f, Line)}
        size = " x ".join(str(shape[d]) for d in dict.fromkeys(at[i] for i in sorted(at)))
        raise Untransferable(
            f"reshapes the map of {size} to {[s if isinstance(s, int) else 'batch' for s in out]}, "
            "a fixed grid that the layers behind it need",
            code=Code.FIXED_GRID,
        )
    return Transfer(found, args=args)


def _written(node: Node, layout: Layout, out: Layout) -> tuple[Any, ...] | None:
    """The op's arguments with the map's own sizes to be rewritten; None where another may be the model's own."""
    if not {"size", "shape", "sizes"} & arguments(node).keys():
        return node.args
    sizes = [*view_sizes(node)]
    first = wrap(argument(node, "dim"), len(layout)) if node.target is aten.unflatten.int else 0
    places = [d - first for d, dim in enumerate(out) if lines_in(dim) and 0 <= d - first < len(sizes)]
    left = [i for i, s in enumerate(sizes) if isinstance(s, int) and s == -1]
    if left == places:
        return node.args
    # beside a size left open a number may be the model's own, where samples or channels would fill the dimension up
    whole = [f.at for dim in layout for f in lines_in(dim)] == [0, 1]
    folds = any(len(lines_in(dim)) == 2 for dim in out) and not any(len(lines_in(dim)) == 2 for dim in layout)
    counts = left and isinstance(shape_of(node)[left[0] + first], int)
    if places and left and (folds or not whole or not counts or left[0] in places):
        return None
    for i in places:
        sizes[i] = Extent(out[i + first])
    return (*node.args[:-1], sizes)
