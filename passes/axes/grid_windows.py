"""Ops that slide a window over rows and columns, pad them, or pool them: what each does to the rows and columns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from passes.axes.grid_layout import Follow, GridAxes, carried, grid_rules_for
from passes.axes.rules.registry import Untransferable
from passes.graph.codes import Code
from passes.graph.ops import CONV2D, POOL2D, argument, shape_of

aten = torch.ops.aten
_MODULES = tuple(f"torch.nn.modules.{m}." for m in ("padding", "pooling", "conv"))
Pair: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A window that slides: each for rows and for columns."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @property
    def reach(self) -> Pair:
        """From the first row or column of a window to its last."""
        return self.dilation[0] * (self.kernel[0] - 1), self.dilation[1] * (self.kernel[1] - 1)


def _pair(value: Any) -> Pair:
    if isinstance(value, int):
        return value, value
    first, *rest = value
    return first, (rest or [first])[0]


def window_of(node: Node) -> Window | None:
    """The window that an op slides over dimensions 2 and 3 of its first input."""
    if node.target in CONV2D:
        kernel: Any = shape_of(node.args[1])[2:]
        stride, dilation = argument(node, "stride"), argument(node, "dilation")
        padding = argument(node, "padding")
        if padding == "same":  # pads (k - 1) d in all, the odd one behind
            padding = [d * (k - 1) // 2 for k, d in zip(kernel, _pair(dilation), strict=True)]
        elif padding == "valid":
            padding = 0
    elif node.target in POOL2D:
        kernel, padding = argument(node, "kernel_size"), argument(node, "padding")
        stride = argument(node, "stride") or kernel
        dilation = argument(node, "dilation", 1)
    else:
        return None
    return Window(_pair(kernel), _pair(stride), _pair(padding), _pair(dilation))


@grid_rules_for(*CONV2D, *POOL2D)
def window(node: Node, axes: GridAxes) -> Follow:
    """Any stride, padding, dilation and groups: it slides over a smaller map as over a smaller image."""
    grid, slides = carried(node, axes), window_of(node)
    assert slides is not None
    if (grid.rows, grid.columns) != (2, 3):
        raise Untransferable("a window slides over other dimensions than rows and columns", code=Code.NEEDS_THE_MAP)
    if tuple(shape_of(node)[2:]) == (1, 1):
        return Follow(None)  # one cell, of a smaller map too: it is held against the dense shape
    step, stride = grid.step, slides.stride
    centre = [Fraction(slides.reach[i], 2) - slides.padding[i] for i in (0, 1)]
    out = replace(
        grid,
        step=(step[0] * stride[0], step[1] * stride[1]),
        start=(grid.start[0] + step[0] * centre[0], grid.start[1] + step[1] * centre[1]),
        mixed=grid.mixed or slides.kernel != (1, 1) or stride != (1, 1),
    )
    return Follow(out)


def _by_torch(node: Node) -> bool:
    """Whether a module of torch's own runs the op: its sizes are then the module's, not computed from the map's."""
    stack: Any = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())
    return str(stack[-1][1]).startswith(_MODULES)


@grid_rules_for(aten.pad.default, aten.constant_pad_nd.default)
def pad(node: Node, axes: GridAxes) -> Follow:
    """More channels; rows and columns where the amounts are the same for the smaller map."""
    grid, rank = carried(node, axes), len(shape_of(node))
    given: Any = argument(node, "pad")
    others = {rank - 1 - i // 2: (given[i], given[i + 1]) for i in range(0, len(given), 2)}
    here = {d: others.pop(d) for d in grid.dims if d in others}
    only_others = any(map(any, others.values())) and not any(map(any, here.values()))
    if not here or only_others:
        return Follow(grid)
    if grid.dims != (2, 3) or any(map(any, others.values())):
        raise Untransferable("pads other dimensions together with rows or columns", code=Code.NEEDS_THE_MAP)
    rows, columns = here.get(2, (0, 0)), here[3]
    period = (1, 1) if _by_torch(node) else _as_tensorflow(node, (sum(rows), sum(columns)))
    start = (grid.start[0] - rows[0] * grid.step[0], grid.start[1] - columns[0] * grid.step[1])
    return Follow(replace(grid, start=start, mixed=True), period=period)


def _as_tensorflow(node: Node, amounts: Pair) -> Pair:
    """By what multiples rows and columns may shrink, where padding may have been computed from their number.

    If it was, then so that the windows behind it give (size / stride) rows and columns, rounded up, as TensorFlow pads:
    declines unless the amounts are those. They depend on the size by its remainder modulo the stride alone.
    """
    size: Any = shape_of(node.args[0])[2:]
    period = [1, 1]
    for reader in node.users:
        slides = window_of(reader) if reader.args[0] is node else None
        for i in (0, 1):
            wanted = None
            if slides is not None and slides.padding[i] == 0:
                stride = slides.stride[i]
                wanted = max((math.ceil(size[i] / stride) - 1) * stride + slides.reach[i] + 1 - size[i], 0)
                period[i] = math.lcm(period[i], stride)
            if wanted != amounts[i]:
                raise Untransferable(
                    "pads rows or columns by amounts that the model may compute from their number", code=Code.FIXED_GRID
                )
    return period[0], period[1]


@grid_rules_for(aten.adaptive_avg_pool2d.default, aten.adaptive_max_pool2d.default)
def adaptive_pool(node: Node, axes: GridAxes) -> Follow:
    """To one cell it is the mean or the maximum of the map; to a fixed grid, that of the smaller map's parts."""
    grid, size = carried(node, axes), _pair(argument(node, "output_size"))
    if grid.dims != (2, 3):
        raise Untransferable("pools other dimensions than rows and columns", code=Code.NEEDS_THE_MAP)
    if size != (1, 1):
        # a module may be told to leave an axis as it is, which looks like its size
        if not _by_torch(node) or any(a == b for a, b in zip(size, shape_of(node.args[0])[2:], strict=True)):
            raise Untransferable(
                f"pools the map to {size[0]} x {size[1]}, a size that the model may compute from the map's",
                code=Code.FIXED_GRID,
            )
    ended = (None, None) if isinstance(node.meta["val"], (tuple, list)) else None
    return Follow(ended, fixed=size != (1, 1))
