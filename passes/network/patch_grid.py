"""Which pixels each token stands for, found from how the sequence was made: rows and columns of a map, flattened.

From the stream back to the value that was flattened, and along its two dimensions back to the image, through
convolutions, pooling, padding and cuts into patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from passes.axes.rules.pointwise import tensors
from passes.graph.base import Refusal, op_name
from passes.graph.codes import Code
from passes.graph.layout import expr
from passes.graph.ops import CONV2D, POOL2D, RESHAPES, argument, elementwise, permuted, shape_of, wrap
from passes.network.branches import ancestors
from passes.network.origins import origins

aten = torch.ops.aten
_SAME_PLACE = {  # a position of the result comes from the same position of the first input
    aten.batch_norm.default, aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default,
    aten.instance_norm.default, aten.linear.default, aten.expand.default,
}  # fmt: skip
_WINDOWS = {*CONV2D, aten.convolution.default, *POOL2D}


@dataclass(frozen=True)
class Extent:
    """Along one side of the image: cell i lies on the pixels from `start + i * step` up to the next cell's start.

    Args:
        field: how many pixels around its middle a cell depends on, by one way back to the image; another may add some.
    """

    cells: int
    start: float = 0
    step: float = 1
    field: float = 1

    def edge(self, i: int, pixels: int) -> int:
        """The first pixel of cell i, within an image of `pixels`; `edge(cells)` is where the last one ends.

        The outer cells reach to the border of the image where they depend on it: windows that overlap do.
        """
        at, over = self.start + i * self.step, (self.field - self.step) / 2
        if i == 0 and at - over <= 0:
            return 0
        if i == self.cells and at + over >= pixels:
            return pixels
        return min(max(round(at), 0), pixels)


@dataclass(frozen=True)
class PatchGrid:
    """The map that a sequence of tokens was: where its cells lie in the image, and which cell each token is.

    Args:
        rows, columns: down and across the image.
        cells: for each token its cell, counted row by row, None for tokens that are none (class token).
    """

    rows: Extent
    columns: Extent
    cells: tuple[int | None, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.cells, self.columns.cells


def find_grid(gm: GraphModule, stream: Node, dim: int) -> PatchGrid:
    """The grid of patches that the tokens of a residual stream are.

    Args:
        stream: a value of it.
        dim: its token dimension, the first of the two where tokens lie on a grid [B, H, W, C].

    Raises:
        Refusal: the tokens are no single map over an image's rows and columns, or it cannot be traced to them.
    """
    dims = (dim, dim + 1) if len(shape_of(stream)) == 4 else (dim,)
    found, above = origins(gm, stream, *dims), ancestors(gm)
    sources = {o.node for o in found if o is not None}
    if len(sources) != 1:
        raise Refusal(
            f"the tokens come from {len(sources)} places, not from one map over the image", stream, code=Code.NO_MAP
        )
    source = sources.pop()
    at = [o.at if o is not None else None for o in found]
    over = [d for d, places in enumerate(zip(*filter(None, at), strict=True)) if len({*places}) > 1]
    cells = [None if a is None else [a[d] for d in over] for a in at]
    if len(over) == 1:
        source, over = _flattened(source, over[0], above)
    if len(over) != 2:
        sizes = " x ".join(str(shape_of(source)[d]) for d in over)
        raise Refusal(
            f"the tokens run over {len(over)} dimensions ({sizes}), not over the rows and columns of one image",
            source,
            "maps are drawn for still images only; rs_compile.optimize prunes models of videos all the same",
            code=Code.NO_MAP,
        )
    columns = int(shape_of(source)[over[1]])
    return PatchGrid(
        *_extents(source, over[0], over[1], above),
        tuple(None if c is None else c[0] * columns + c[1] if len(c) == 2 else c[0] for c in cells),
    )


def map_grid(gm: GraphModule, node: Node) -> PatchGrid:
    """Where the cells of a map [B, C, H, W] lie in the image it was made from.

    Raises:
        Refusal: it cannot be traced to the image.
    """
    rows, columns = _extents(node, 2, 3, ancestors(gm))
    return PatchGrid(rows, columns, tuple(range(rows.cells * columns.cells)))


def _extents(node: Node, down: int, across: int, above: Mapping[Node, int]) -> tuple[Extent, Extent]:
    """Where rows and columns of a map lie in the image it was made from."""
    (image, y, rows), (other, x, columns) = (
        _traced(node, d, Extent(int(shape_of(node)[d])), above) for d in (down, across)
    )
    if image is not other or x <= y:
        raise Refusal(
            "rows and columns of the tokens' map do not come from rows and columns of one image", node, code=Code.NO_MAP
        )
    return rows, columns


def _flattened(node: Node, dim: int, above: Mapping[Node, int]) -> tuple[Node, list[int]]:
    """The value and those of its dimensions that a dimension was flattened from."""
    while True:
        if node.target in RESHAPES:
            before = node.all_input_nodes[0]
            dims = _merged([expr(s) for s in shape_of(before)], [expr(s) for s in shape_of(node)], dim)
            if len(dims) > 1:
                return before, dims
            if not dims:
                raise Refusal("the tokens are cut in a way that is no grid of patches", node, code=Code.NO_MAP)
            node, dim = before, dims[0]
        else:
            node, dim = _back(node, dim, above)


def _merged(before: list[sympy.Expr], after: list[sympy.Expr], dim: int) -> list[int]:
    """The dimensions, none of size one, that a reshape joins to `dim`; empty where it joins parts of them."""
    ahead, size, dims = sympy.prod(after[:dim]), after[dim], []
    for d, have in enumerate(before):
        if sympy.prod(before[:d]) == ahead and size != 1:
            if have != 1:
                dims.append(d)
            ahead, size = ahead * have, sympy.cancel(size / have)
    return dims if size == 1 else []


def _traced(node: Node, dim: int, extent: Extent, above: Mapping[Node, int]) -> tuple[Node, int, Extent]:
    """The image, the dimension of it that `dim` of a value runs along, and where the cells lie on it."""
    while node.op != "placeholder":
        start, step, field = extent.start, extent.step, extent.field
        rank = len(shape_of(node))
        if node.target in _WINDOWS and rank == 4 and dim >= 2:
            size, stride, padding = _window(node, dim - 2)
            # around the middle of the window
            start, step = stride * start + (size - stride) / 2 - padding, stride * step
            field = stride * (field - 1) + size
            node = node.all_input_nodes[0]
        elif node.target in RESHAPES:
            before = node.all_input_nodes[0]
            dim, ratio = _outer([expr(s) for s in shape_of(before)], [expr(s) for s in shape_of(node)], dim, node)
            start, step, field, node = start * ratio, step * ratio, field * ratio, before
        elif node.target in (aten.constant_pad_nd.default, aten.pad.default):
            pads: Any = argument(node, "pad")
            start -= pads[2 * (rank - 1 - dim)] if 2 * (rank - 1 - dim) < len(pads) else 0
            node = node.all_input_nodes[0]
        elif node.target is aten.slice.Tensor:
            if wrap(argument(node, "dim"), rank) == dim:
                first: Any = argument(node, "start") or 0
                every: Any = argument(node, "step")  # as a window of one that slides
                start = every * start + (1 - every) / 2 + wrap(first, int(shape_of(node.all_input_nodes[0])[dim]))
                step, field = every * step, every * (field - 1) + 1
            node = node.all_input_nodes[0]
        else:
            node, dim = _back(node, dim, above)
        extent = Extent(extent.cells, start, step, field)
    return node, dim, extent


def _outer(before: list[sympy.Expr], after: list[sympy.Expr], dim: int, node: Node) -> tuple[int, int]:
    """The dimension that a reshape cut `dim` out of as the outer part, and the size of the inner part."""
    ahead = sympy.prod(after[:dim])
    for d, have in enumerate(before):
        inner = sympy.cancel(have / after[dim])
        if sympy.prod(before[:d]) == ahead and have != 1 and inner.is_integer:
            return d, int(inner)
    raise Refusal(
        "rows or columns of the tokens' map are cut in a way that is no grid of patches", node, code=Code.NO_MAP
    )


def _window(node: Node, side: int) -> tuple[int, int, int]:
    """Extent, stride and leading padding of a convolution's or pooling's window along a spatial dimension."""
    kernel: Any = argument(node, "kernel_size") if node.target in POOL2D else shape_of(node.all_input_nodes[1])[2:]

    def along(value: Any) -> int:
        return int(value if isinstance(value, int) else value[side if len(value) > 1 else 0])

    dilation = along(argument(node, "dilation", 1))
    size = dilation * (along(kernel) - 1) + 1
    stride: Any = argument(node, "stride") or (kernel if node.target in POOL2D else 1)
    padding: Any = argument(node, "padding")
    if isinstance(padding, str):
        padding = (size - 1) // 2 if padding == "same" else 0
    return size, along(stride), along(padding)


def _back(node: Node, dim: int, above: Mapping[Node, int]) -> tuple[Node, int]:
    """The value that a value comes from position by position, and the dimension of it."""
    rank = len(shape_of(node))
    inputs: list[Node] = tensors(node.args)
    if inputs and (order := permuted(node)) is not None:
        return inputs[0], order[dim]
    channels = node.target is aten.linear.default and dim == rank - 1
    pointwise = elementwise(node.target)
    joined = node.target is aten.cat.default and wrap(argument(node, "dim"), rank) != dim
    if inputs and not channels and (pointwise or joined or node.target in _SAME_PLACE):
        for n in inputs:
            d = dim - rank + len(shape_of(n))
            if d >= 0 and expr(shape_of(n)[d]) == expr(shape_of(node)[dim]) and above[n] & 1:
                return n, d
    raise Refusal(
        f"the tokens' rows and columns cannot be followed back to the image through {op_name(node)}",
        node,
        "maps are drawn for models that cut an image into patches by convolutions or reshapes",
        code=Code.NO_MAP,
    )
