"""The grid axes: from one map onwards, which dimensions of which values are its rows and columns.

A forward dataflow analysis by the rules that tokens go by as well (`passes.axes.rules`), and some of maps alone. It
changes nothing. A convolution reads the smaller map as it would read a smaller image, so most ops carry the axes on
with no argument rewritten; what names a size of the grid, or an op without a rule, refuses.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.axes.rules import MapContext, Transfer, Untransferable
from passes.axes.rules.applied import transfer_of
from passes.axes.rules.windows import window_of
from passes.graph.base import Refusal, op_name
from passes.graph.codes import Code
from passes.graph.layout import Dim, Layout, Line, Maps, expr, holds_lines, lines_in, plain, sequences
from passes.graph.splice import ORIGIN

RESTORE = "restore"  # origin of what reads a cut map and gives it back at full size
WAY_OUT = "cut a later stage, whose map no such op reads, or give the part of the model before it"


@dataclass(frozen=True)
class Grid:
    """Where a value holds the rows and columns of the map that is followed: its layout, seen from them.

    Args:
        rows: the dimension of the rows; None where a reduction ended it.
        columns: that of the columns; the same one where both are folded into it.
        step: rows and columns of the followed map from one row or column of this value to the next.
        start: the row and column of the followed map that this value's first ones are centred on.
        mixed: a cell depends on other cells of the followed map.
    """

    rows: int | None = 2
    columns: int | None = 3
    step: tuple[int, int] = (1, 1)
    start: tuple[Fraction, Fraction] = (Fraction(0), Fraction(0))
    mixed: bool = False

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(d for d in (self.rows, self.columns) if d is not None))


@dataclass
class GridAxes:
    """What the analysis found downstream of `start`.

    Args:
        start: the map whose rows and columns are followed.
        layouts: for each value that runs over rows or columns its layout (a tuple of layouts for a tuple value).
        transfers: for each op that was carried through, what it does; includes ops that end the axes.
        dense: consumers that need every row and column: outputs, and what restores an earlier cut.
        mixed: values of which a cell depends on other cells of the map.
        fixed: values made from the map pooled to a grid of a fixed size.
    """

    start: Node
    layouts: dict[Node, Any] = field(default_factory=dict)
    transfers: dict[Node, Transfer] = field(default_factory=dict)
    dense: list[Node] = field(default_factory=list)
    mixed: set[Node] = field(default_factory=set)
    fixed: set[Node] = field(default_factory=set)

    def put(self, node: Node, transfer: Transfer) -> None:
        """Notes what an op does."""
        self.transfers[node] = transfer
        out: Any = transfer.out
        if out is not None and (isinstance(node.meta["val"], (tuple, list)) or holds_lines(out)):
            self.layouts[node] = out
            if transfer.mixes or any(n in self.mixed for n in node.all_input_nodes):
                self.mixed.add(node)
        if transfer.fixed:
            self.fixed.add(node)

    def lines(self, node: Node) -> list[Line]:
        """The rows and the columns of a value that is one tensor and holds any."""
        layout = self.layouts.get(node, ()) if isinstance(node.meta.get("val"), torch.Tensor) else ()
        return sorted((f for dim in layout for f in lines_in(dim)), key=lambda f: f.at)

    def grid(self, node: Node) -> Grid | None:
        """Where a value that is one tensor holds rows and columns."""
        lines = {f.at: f for f in self.lines(node)}
        if not lines:
            return None
        at = {f.at: d for d, dim in enumerate(self.layouts[node]) for f in lines_in(dim)}
        rows, columns = (lines.get(i, Line(i, 1)) for i in (0, 1))
        step, start = (rows.step, columns.step), (rows.start, columns.start)
        return Grid(at.get(0), at.get(1), step, start, node in self.mixed)

    def size(self, node: Node) -> tuple[int, ...]:
        """How many rows and columns a value holds."""
        return tuple(f.count for f in self.lines(node))

    def sample_for_sample(self, node: Node) -> bool:
        """Whether dimension 0 of a value that holds rows and columns has the samples of `start`."""
        return bool(self.layouts[node][0] == self.layouts[self.start][0])

    @property
    def fitting(self) -> str:
        """How many rows and columns can leave so that every layer's map loses its share of them."""
        lines = [line for node in self.layouts for line in self.lines(node)]
        rows, columns = (math.lcm(*(f.step for f in lines if f.at == i)) for i in (0, 1))
        return f"let a multiple of {rows} rows and of {columns} columns leave"


def _samples(node: Node) -> Maps:
    """The factor of samples of a value whose dimension 0 runs over them, or over frames of them."""
    size = expr(node.meta["val"].shape[0])
    return Maps(size / (sequences(size) or 1))


def _layout(node: Node, samples: Maps, grid: Grid, size: tuple[int, int]) -> Layout:
    shape = node.meta["val"].shape
    first = plain(shape[0], samples)
    dims: list[Dim] = [first if expr(shape[0]).free_symbols else (samples,), *(plain(s, samples) for s in shape[1:])]
    lines = (Line(0, size[0]), Line(1, size[1]))
    for d in grid.dims:
        dims[d] = tuple(line for line, at in zip(lines, (grid.rows, grid.columns), strict=True) if at == d)
    return tuple(dims)


def follow_grid(
    start: Node,
    grid: Grid | None = None,
    size: tuple[int, int] | None = None,
    within: Collection[Node] | None = None,
) -> GridAxes:
    """Follows the rows and columns of `start`, [B, C, H, W], through the graph.

    Args:
        start: the map.
        grid: where it holds them; dimensions 2 and 3 by default.
        size: how many, where they are folded into one dimension.
        within: follow only these nodes; what cannot be carried through is then left out, not refused.

    Raises:
        Refusal: an op is not proven to mean the same on a smaller grid.
    """
    samples = _samples(start)
    rows, columns = size or start.meta["val"].shape[2:]
    layout = _layout(start, samples, grid or Grid(), (rows, columns))
    axes = GridAxes(start, {start: layout})
    context = MapContext(axes.layouts, samples, (layout[0], (Line(0, rows),), (Line(1, columns),)), axes.fixed)
    node = start.next
    while node.op != "root":
        carries = any(n in axes.layouts for n in node.all_input_nodes)
        if any(n in axes.fixed for n in node.all_input_nodes):
            if within is None:
                _need_no_size(node)
            axes.fixed.add(node)
        if not carries or (within is not None and node not in within):
            pass
        elif node.op == "output" or ORIGIN.get(node) == RESTORE:
            axes.dense.append(node)
        else:
            try:
                axes.put(node, _transfer(node, context))
            except Untransferable as reason:
                if within is None:
                    raise Refusal(reason.text, node, WAY_OUT, code=reason.code) from reason
        node = node.next
    return axes


def follow_maps(gm: GraphModule) -> GridAxes:
    """Where values that come from convolutions hold the rows and columns of a map, whatever its resolution.

    What cannot be carried through is left out, until the next convolution.
    """
    nodes = list(gm.graph.nodes)
    windows = [n for n in nodes if window_of(n) is not None and n.meta["val"].dim() == 4]
    axes, samples = GridAxes(nodes[0]), _samples(windows[0]) if windows else Maps(expr(1))
    context, starts = MapContext(axes.layouts, samples), set(windows)
    for node in nodes:
        if node in starts:
            rows, columns = node.meta["val"].shape[2:]
            axes.layouts[node] = _layout(node, samples, Grid(), (rows, columns))
        elif any(n in axes.layouts for n in node.all_input_nodes):
            with contextlib.suppress(Untransferable):
                transfer = _transfer(node, context)
                if transfer.out is not None:
                    axes.put(node, transfer)
    return axes


def _need_no_size(node: Node) -> None:
    if op_name(node).startswith("aten.upsample"):
        raise Refusal(
            "resizes what was pooled to a fixed grid to a size that may be the map's",
            node,
            WAY_OUT,
            code=Code.FIXED_GRID,
        )


def _transfer(node: Node, context: MapContext) -> Transfer:
    mutable = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    if mutable and node.target not in context.rules:
        raise Untransferable("writes in place into a map whose rows and columns leave", code=Code.IN_PLACE)
    return transfer_of(node, context)
