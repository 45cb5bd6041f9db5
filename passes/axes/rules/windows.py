"""Ops that slide a window over rows and columns, pad them, or pool them: what each does to the rows and columns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from passes.axes.rules.registry import Context, Transfer, Untransferable, grid_rules_for, need_free
from passes.axes.rules.tokens import pad as pad_of_tokens
from passes.graph.codes import Code
from passes.graph.layout import Layout, Line, holds_lines, lines_in
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


def map_in(layout: Layout) -> tuple[Line, Line] | None:
    """The rows and columns of a map [B, C, H, W]; None where a value holds them otherwise."""
    rows, columns = (lines_in(dim) for dim in layout[2:]) if len(layout) == 4 else ((), ())
    if holds_lines(layout[:2]) or ([f.at for f in rows], [f.at for f in columns]) != ([0], [1]):
        return None
    return rows[0], columns[0]


@grid_rules_for(*CONV2D, *POOL2D)
def window(node: Node, ctx: Context) -> Transfer:
    """Any stride, padding, dilation and groups: it slides over a smaller map as over a smaller image."""
    layout, slides, size = ctx.carried(node), window_of(node), shape_of(node)[2:]
    lines = map_in(layout)
    assert slides is not None
    if lines is None:
        raise Untransferable("a window slides over other dimensions than rows and columns", code=Code.NEEDS_THE_MAP)
    if size == (1, 1):
        return Transfer(None)  # one cell, of a smaller map too: it is held against the dense shape
    need_free(layout, [1] if node.target in CONV2D else [], "a convolution over a dimension that")
    out = []
    for i, line in enumerate(lines):
        centre = Fraction(slides.reach[i], 2) - slides.padding[i]
        out.append((Line(i, size[i], line.step * slides.stride[i], line.start + line.step * centre),))
    channels = layout[1] if node.target in POOL2D else ctx.plain(shape_of(node)[1])
    mixes = (slides.kernel, slides.stride) != ((1, 1), (1, 1))
    return Transfer((layout[0], channels, *out), mixes=mixes)


def _by_torch(node: Node) -> bool:
    """Whether a module of torch's own runs the op: its sizes are then the module's, not computed from the map's."""
    stack: Any = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())
    return str(stack[-1][1]).startswith(_MODULES)


@grid_rules_for(aten.pad.default, aten.constant_pad_nd.default)
def pad(node: Node, ctx: Context) -> Transfer:
    """More channels; rows and columns where the amounts are the same for the smaller map."""
    layout, rank, size = ctx.carried(node), len(shape_of(node)), shape_of(node)
    given: Any = argument(node, "pad")
    others = {rank - 1 - i // 2: (given[i], given[i + 1]) for i in range(0, len(given), 2)}
    here = {d: others.pop(d) for d in range(rank) if lines_in(layout[d]) and d in others}
    only_others = any(map(any, others.values())) and not any(map(any, here.values()))
    if not here or only_others:
        return pad_of_tokens(node, ctx)
    lines = map_in(layout)
    if lines is None or any(map(any, others.values())):
        raise Untransferable("pads other dimensions together with rows or columns", code=Code.NEEDS_THE_MAP)
    rows, columns = here.get(2, (0, 0)), here[3]
    period = (1, 1) if _by_torch(node) else _as_tensorflow(node, (sum(rows), sum(columns)))
    out = [
        (replace(line, count=size[2 + i], start=line.start - before[0] * line.step),)
        for i, (line, before) in enumerate(zip(lines, (rows, columns), strict=True))
    ]
    return Transfer((*layout[:2], *out), mixes=True, period=period)


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
def adaptive_pool(node: Node, ctx: Context) -> Transfer:
    """To one cell it is the mean or the maximum of the map; to a fixed grid, that of the smaller map's parts."""
    layout, size = ctx.carried(node), _pair(argument(node, "output_size"))
    if map_in(layout) is None:
        raise Untransferable("pools other dimensions than rows and columns", code=Code.NEEDS_THE_MAP)
    if size != (1, 1):
        # a module may be told to leave an axis as it is, which looks like its size
        if not _by_torch(node) or any(a == b for a, b in zip(size, shape_of(node.args[0])[2:], strict=True)):
            raise Untransferable(
                f"pools the map to {size[0]} x {size[1]}, a size that the model may compute from the map's",
                code=Code.FIXED_GRID,
            )
    ended = (None, None) if isinstance(node.meta["val"], (tuple, list)) else None
    return Transfer(ended, fixed=size != (1, 1))
