"""What each op does to the rows and columns of a map, by family of op.

A rule gets the fx node and what is known so far, with the dense shapes; it says where the result holds rows
and columns, or declines with a reason. Whether the op runs on the smaller grid is tried on fake tensors later.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch.fx import Node

from passes.axes.grid_layout import Follow, Grid, GridAxes, carried, grid_rules_for
from passes.axes.rules.pointwise import tensors
from passes.axes.rules.registry import Untransferable
from passes.graph.codes import Code
from passes.graph.layout import expr
from passes.graph.ops import ELEMENTWISE, SHAPED_LIKE, VIEWS, argument, shape_of, view_sizes, wrap

aten = torch.ops.aten


def _need_free(grid: Grid, dims: Sequence[int], doing: str) -> None:
    if set(dims) & set(grid.dims):
        raise Untransferable(f"{doing} runs over rows or columns", code=Code.NEEDS_THE_MAP)


def _parted(grid: Grid, dim: int, before: Any, after: Any) -> Grid:
    """The grid where an op may have taken or joined samples, which only a change of their number shows."""
    return replace(grid, parted=grid.parted or (dim == 0 and expr(before[0]) != expr(after[0])))


def _joined(node: Node, axes: GridAxes, inputs: Sequence[Node], rank: int) -> Follow:
    """Inputs that broadcast to one shape; those from before the cut with an entry per cell are cut alike."""
    found: Grid | None = None
    for n in inputs:
        grid = axes.grid(n)
        if grid is None:
            continue
        shift = rank - len(shape_of(n))
        own = replace(grid, rows=_moved(grid.rows, shift), columns=_moved(grid.columns, shift))
        if found is None:
            found, size = own, axes.sizes[n]
        elif (own.rows, own.columns, own.step) != (found.rows, found.columns, found.step) or size != axes.sizes[n]:
            raise Untransferable("two maps meet whose rows or columns do not belong together", code=Code.OTHER_SEQUENCE)
        else:
            found = replace(found, mixed=found.mixed or own.mixed, parted=found.parted or own.parted)
    assert found is not None
    out = shape_of(node) if isinstance(node.meta["val"], torch.Tensor) else tuple(node.meta["val"][0].shape)
    aligned = tuple(n for n in inputs if axes.grid(n) is None and _per_cell(n, found, axes, out, rank))
    if aligned and not all(axes.sample_for_sample(n) for n in inputs if n in axes.grids and len(shape_of(n)) == rank):
        raise Untransferable(
            "meets a value from before the cut, of which it has not every sample", code=Code.SAMPLES_MEET
        )
    return Follow(found, aligned)


def _moved(dim: int | None, by: int) -> int | None:
    return None if dim is None else dim + by


def _per_cell(n: Node, grid: Grid, axes: GridAxes, out: Sequence[Any], rank: int) -> bool:
    """Whether an input from before the cut has an entry per cell; declines where it cannot be cut alike."""
    shape = shape_of(n)
    at = [d - (rank - len(shape)) for d in grid.dims]
    full = [d >= 0 and not (isinstance(shape[d], int) and shape[d] == 1) for d in at]
    if not any(full):
        return False
    if n in axes.fixed:
        raise Untransferable(
            "meets what was pooled to a fixed grid and given rows and columns again", code=Code.FIXED_GRID
        )
    same = grid.step == (1, 1) and grid.start == (0, 0) and (grid.rows, grid.columns) == (2, 3)
    cut = axes.sizes.get(axes.start)  # None where all maps of a graph are followed, and none is cut
    if not (same and all(full) and len(shape) == 4 and tuple(out[2:]) == cut):
        raise Untransferable(
            "meets a value from before the cut, whose rows and columns cannot be matched here", code=Code.OTHER_SEQUENCE
        )
    return True


@grid_rules_for("pointwise", *ELEMENTWISE, *SHAPED_LIKE)
def pointwise(node: Node, axes: GridAxes) -> Follow:
    """Elementwise with broadcasting; dropout, casts and copies are the case of one input."""
    val = node.meta["val"]
    values = val if isinstance(val, (tuple, list)) else (val,)
    joined = _joined(node, axes, tensors((node.args, node.kwargs)), values[0].dim())
    out: Any = joined.out
    return replace(joined, out=tuple(out for _ in values)) if isinstance(val, (tuple, list)) else joined


_ANY_DIMS = (  # mean the same on a smaller map
    aten.mean.dim, aten.amax.default, aten.amin.default, aten.var_mean.correction, aten.var.correction,
    aten.std.correction, aten.var_mean.dim, aten.var.dim, aten.std.dim,
)  # fmt: skip
_CHANNELS_ONLY = (
    aten.sum.dim_IntList, aten.max.dim, aten.min.dim, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim,
    aten.logsumexp.default, aten.argmax.default,
)  # fmt: skip


@grid_rules_for(*_ANY_DIMS, *_CHANNELS_ONLY)
def reduction(node: Node, axes: GridAxes) -> Follow:
    """Over channels anything goes; over rows and columns a mean, an extremum, a variance, which end the axis."""
    grid, rank = carried(node, axes), len(shape_of(node.args[0]))
    given: Any = argument(node, "dim")
    dims = range(rank) if given is None or given == [] else [given] if isinstance(given, int) else given
    over = {wrap(d, rank) for d in dims}
    if over & set(grid.dims) and node.target in _CHANNELS_ONLY:
        raise Untransferable(
            "reduces rows and columns to something that depends on how many there are", code=Code.NEEDS_THE_MAP
        )
    if 0 in over:
        raise Untransferable("reduces the samples of the batch", code=Code.SAMPLES_MEET)
    kept = bool(argument(node, "keepdim"))

    def after(dim: int | None) -> int | None:
        if dim is None or dim in over:
            return None
        return dim if kept else dim - sum(d < dim for d in over)

    out = replace(grid, rows=after(grid.rows), columns=after(grid.columns), mixed=True)
    result = out if out.dims else None
    val = node.meta["val"]
    return Follow(tuple(result for _ in val) if isinstance(val, (tuple, list)) else result)


@grid_rules_for(aten.batch_norm.default)
def batch_norm(node: Node, axes: GridAxes) -> Follow:
    """An affine map of channels from running statistics; in training its statistics are the smaller map's."""
    grid = carried(node, axes)
    _need_free(grid, [0, 1], "batch norm")
    return Follow(replace(grid, mixed=grid.mixed or bool(argument(node, "training"))))


@grid_rules_for(aten.group_norm.default)
def group_norm(node: Node, axes: GridAxes) -> Follow:
    """Statistics over channels and cells of one sample: the smaller map's."""
    grid = carried(node, axes)
    _need_free(grid, [0, 1], "group norm")
    return Follow(replace(grid, mixed=True))


@grid_rules_for(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(node: Node, axes: GridAxes) -> Follow:
    """Normalises the last dimensions, which must be channels."""
    grid, rank = carried(node, axes), len(shape_of(node))
    _need_free(grid, range(rank - len(argument(node, "normalized_shape")), rank), "a norm")
    return Follow(grid)


@grid_rules_for(aten.linear.default)
def linear(node: Node, axes: GridAxes) -> Follow:
    """Channels last: every cell by itself."""
    grid = carried(node, axes)
    _need_free(grid, [len(shape_of(node)) - 1], "a linear layer")
    return Follow(grid)


@grid_rules_for(aten.prelu.default)
def prelu(node: Node, axes: GridAxes) -> Follow:
    """Its slopes are one, or one for each entry of dimension 1."""
    grid = carried(node, axes)
    _need_free(grid, [1], "an activation with learned slopes")
    return Follow(grid)


@grid_rules_for(aten.softmax.int, aten.log_softmax.int, aten.glu.default)
def along(node: Node, axes: GridAxes) -> Follow:
    """Works along one dimension, which must be channels."""
    grid = carried(node, axes)
    _need_free(grid, [wrap(argument(node, "dim"), len(shape_of(node)))], "an op along a dimension that")
    return Follow(grid)


def _reordered(grid: Grid, order: Sequence[int]) -> Grid:
    def to(dim: int | None) -> int | None:
        return None if dim is None else order.index(dim)

    return replace(grid, rows=to(grid.rows), columns=to(grid.columns))


@grid_rules_for(aten.permute.default)
def permute(node: Node, axes: GridAxes) -> Follow:
    """Dimensions in another order."""
    rank = len(shape_of(node))
    return Follow(_reordered(carried(node, axes), [wrap(d, rank) for d in argument(node, "dims")]))


@grid_rules_for(aten.transpose.int)
def transpose(node: Node, axes: GridAxes) -> Follow:
    """Two dimensions exchanged."""
    order = list(range(len(shape_of(node))))
    a, b = (wrap(argument(node, name), len(order)) for name in ("dim0", "dim1"))
    order[a], order[b] = order[b], order[a]
    return Follow(_reordered(carried(node, axes), order))


@grid_rules_for(aten.cat.default)
def cat(node: Node, axes: GridAxes) -> Follow:
    """Along channels; maps from before the cut are cut alike."""
    parts: Any = argument(node, "tensors")
    rank = len(shape_of(node))
    follow, dim = _joined(node, axes, list(dict.fromkeys(parts)), rank), wrap(argument(node, "dim"), rank)
    assert isinstance(follow.out, Grid)
    _need_free(follow.out, [dim], "a concatenation")
    out = _parted(follow.out, dim, shape_of(parts[0]), shape_of(node))
    if out.parted and follow.aligned:
        raise Untransferable("joins samples of a map from before the cut", code=Code.SAMPLES_MEET)
    return replace(follow, out=out)


@grid_rules_for(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes)
def split(node: Node, axes: GridAxes) -> Follow:
    """Parts of the channels."""
    grid, val = carried(node, axes), node.meta["val"]
    dim = wrap(argument(node, "dim"), val[0].dim())
    _need_free(grid, [dim], "a split")
    return Follow(tuple(_parted(grid, dim, shape_of(node.args[0]), part.shape) for part in val))


@grid_rules_for(operator.getitem)
def getitem(node: Node, axes: GridAxes) -> Follow:
    """One of several results."""
    return Follow(axes.grid(node.args[0])[node.args[1]])


@grid_rules_for(aten.slice.Tensor)
def slice_(node: Node, axes: GridAxes) -> Follow:
    """Part of the channels, or every n-th row or column from the first to the last."""
    grid, shape = carried(node, axes), shape_of(node.args[0])
    dim = wrap(argument(node, "dim"), len(shape))
    if dim not in grid.dims:
        return Follow(_parted(grid, dim, shape, shape_of(node)))
    start, end, step = argument(node, "start"), argument(node, "end"), argument(node, "step")
    if start not in (None, 0) or not (end is None or end == torch.iinfo(torch.int64).max):
        raise Untransferable("takes rows or columns by their number", code=Code.NEEDS_THE_MAP)
    if step != 1 and grid.rows == grid.columns:
        raise Untransferable(
            "takes every n-th cell of a map that is folded into one dimension", code=Code.NEEDS_THE_MAP
        )
    steps = (step, 1) if dim == grid.rows else (1, step)
    return Follow(replace(grid, step=(grid.step[0] * steps[0], grid.step[1] * steps[1]), mixed=grid.mixed or step != 1))


@grid_rules_for(aten.sym_size.int)
def size(node: Node, axes: GridAxes) -> Follow:
    """The number of samples; a number of rows or columns would be a literal."""
    _need_free(carried(node, axes), [argument(node, "dim")], "a size that")
    return Follow(None)


@grid_rules_for(aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default)
def new(node: Node, axes: GridAxes) -> Follow:
    """A value of its own, such as the mask of stochastic depth; it must not have a size of the grid."""
    if any(isinstance(s, int) and s != 1 for s in shape_of(node)):
        raise Untransferable("makes a value whose size may be that of the grid", code=Code.FIXED_GRID)
    return Follow(None)


@grid_rules_for(aten.select.int, aten.unbind.int)
def select(node: Node, axes: GridAxes) -> Follow:
    """One entry, or each, along channels or heads, whose dimension goes."""
    grid, shape = carried(node, axes), shape_of(node.args[0])
    over = wrap(argument(node, "dim"), len(shape))
    _need_free(grid, [over], "one entry of a dimension that")
    if not isinstance(shape[over], int):
        raise Untransferable("takes one sample of the batch", code=Code.SAMPLES_MEET)
    rows, columns = (None if d is None else d - (d > over) for d in (grid.rows, grid.columns))
    out, val = replace(grid, rows=rows, columns=columns), node.meta["val"]
    return Follow(tuple(out for _ in val) if isinstance(val, (tuple, list)) else out)


@grid_rules_for(aten.scaled_dot_product_attention.default)
def attention(node: Node, axes: GridAxes) -> Follow:
    """Cells attend to cells, of this map or of one that a window made from it: to those of the smaller map."""
    given: list[Any] = [argument(node, name) for name in ("query", "key", "value")]
    query, key, value = grids = [axes.grid(n) for n in given]
    if argument(node, "attn_mask") is not None or argument(node, "is_causal"):
        raise Untransferable(
            "attends by a mask, which may have an entry per cell, or in order", code=Code.NEEDS_THE_MAP
        )
    for n, grid in zip(given, grids, strict=True):
        if grid is not None and (grid.rows, grid.columns) != (len(shape_of(n)) - 2,) * 2:
            raise Untransferable("attends along rows or columns alone, or over channels", code=Code.NEEDS_THE_MAP)
    if (key is None) != (value is None) or (key is not None and axes.sizes[given[1]] != axes.sizes[given[2]]):
        raise Untransferable("takes keys and values of different maps", code=Code.OTHER_SEQUENCE)
    return Follow(None if query is None else replace(query, mixed=True), apart=True)


def _cells_at(shape: Sequence[Any], grid: Grid, size: tuple[int, int], out: Sequence[Any]) -> tuple[int, int] | None:
    """Where a view of a value holds its rows and columns, each whole; None where it regroups them."""
    if grid.rows is None or grid.columns is None or grid.columns - grid.rows not in (0, 1):
        return None
    shape, out = [*map(expr, shape)], [*map(expr, out)]
    before, behind = math.prod(shape[: grid.rows]), math.prod(shape[grid.columns + 1 :])
    for at in range(len(out)):
        if math.prod(out[:at]) == before:
            if out[at : at + 2] == [*size] and math.prod(out[at + 2 :]) == behind:
                return at, at + 1
            if out[at] == size[0] * size[1] and math.prod(out[at + 1 :]) == behind:
                return at, at
    return None


def _written(node: Node, grid: Grid, at: tuple[int, int]) -> dict[int, Literal["rows", "columns", "cells"]] | None:
    """Places in the op's list of sizes that are the map's; None where another may be the model's own."""
    if node.target is aten.flatten.using_ints:
        return {}
    split = node.target is aten.unflatten.int
    sizes = view_sizes(node)
    first = wrap(argument(node, "dim"), len(shape_of(node.args[0]))) if split else 0
    names: Any = {at[0]: "cells"} if at[0] == at[1] else {at[0]: "rows", at[1]: "columns"}
    places = {d - first: name for d, name in names.items() if 0 <= d - first < len(sizes)}
    left = [i for i, s in enumerate(sizes) if isinstance(s, int) and s == -1]
    if left == [*places]:
        return {}
    # beside a size left open a number may be the model's own, where samples or channels would fill the dimension up
    whole = at[0] != at[1] or grid.rows == grid.columns
    if places and left and not (whole and left[0] not in places and isinstance(shape_of(node)[left[0] + first], int)):
        return None
    return places


@grid_rules_for(aten.flatten.using_ints, aten.unflatten.int, *VIEWS)
def view(node: Node, axes: GridAxes) -> Follow:
    """Rows and columns folded into one dimension, or out of it; channels and heads in any other way.

    Where their numbers are written, only those of the smaller map fit, whatever the model computes them from.
    """
    grid, shape, out = carried(node, axes), shape_of(node.args[0]), shape_of(node)
    at = _cells_at(shape, grid, axes.sizes[node.all_input_nodes[0]], out)
    written = None if at is None else _written(node, grid, at)
    if at is not None and written is not None:
        return Follow(replace(grid, rows=at[0], columns=at[1]), sizes=tuple(written.items()))
    size = " x ".join(str(shape[d]) for d in grid.dims)
    raise Untransferable(
        f"reshapes the map of {size} to {[s if isinstance(s, int) else 'batch' for s in out]}, "
        "a fixed grid that the layers behind it need",
        code=Code.FIXED_GRID,
    )
