"""The grid axes: from one [B, C, H, W] map onwards, which dimensions of which values are its rows and columns.

A forward dataflow analysis with one rule per op (`grid_rules`, `grid_windows`). It changes nothing. A convolution
reads the smaller map as it would read a smaller image, so most ops carry the axes on with no argument
rewritten; what names a size of the grid, or an op without a rule, refuses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection

import torch
from torch.fx import GraphModule, Node

from passes.axes import grid_rules, grid_windows
from passes.axes.grid_layout import Follow, Grid, GridAxes, rule_for, size_of
from passes.axes.grid_windows import window_of
from passes.axes.rules.registry import Untransferable, rule_faults
from passes.graph.base import Refusal, op_name
from passes.graph.codes import Code
from passes.graph.splice import ORIGIN

RULES = (grid_rules, grid_windows)  # to import them fills the table
RESTORE = "restore"  # origin of what reads a cut map and gives it back at full size
WAY_OUT = "cut a later stage, whose map no such op reads, or give the part of the model before it"


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
    grid = grid or Grid()
    axes = GridAxes(start, {start: grid}, {start: size or size_of(start, grid, {})})
    node = start.next
    while node.op != "root":
        carries = any(n in axes.grids for n in node.all_input_nodes)
        if any(n in axes.fixed for n in node.all_input_nodes):
            if within is None:
                _need_no_size(node)
            axes.fixed.add(node)
        if not carries or (within is not None and node not in within):
            pass
        elif node.op == "output" or node.meta.get(ORIGIN) == RESTORE:
            axes.dense.append(node)
        else:
            try:
                follow = _follow(node, axes)
            except Untransferable as reason:
                if within is None:
                    raise Refusal(reason.text, node, WAY_OUT, code=reason.code) from reason
            else:
                axes.follows[node] = follow
                if follow.fixed:
                    axes.fixed.add(node)
                if follow.out is not None:
                    axes.put(node, follow.out)
        node = node.next
    return axes


def follow_maps(gm: GraphModule) -> GridAxes:
    """Where values that come from convolutions hold the rows and columns of a map, whatever its resolution.

    What cannot be carried through is left out, until the next convolution.
    """
    start = next(iter(gm.graph.nodes))
    axes = GridAxes(start)
    for node in gm.graph.nodes:
        if window_of(node) is not None and node.meta["val"].dim() == 4:
            axes.put(node, Grid())
        elif any(n in axes.grids for n in node.all_input_nodes):
            with contextlib.suppress(Untransferable):
                follow = _follow(node, axes)
                if follow.out is not None:
                    axes.follows[node] = follow
                    axes.put(node, follow.out)
    return axes


def _need_no_size(node: Node) -> None:
    if op_name(node).startswith("aten.upsample"):
        raise Refusal(
            "resizes what was pooled to a fixed grid to a size that may be the map's",
            node,
            WAY_OUT,
            code=Code.FIXED_GRID,
        )


def _follow(node: Node, axes: GridAxes) -> Follow:
    rule = rule_for(node.target)
    if rule is None:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise Untransferable("writes in place into a map whose rows and columns leave", code=Code.IN_PLACE)
        raise Untransferable("no rule says what this op does on a smaller grid of rows and columns", code=Code.NO_RULE)
    with rule_faults(node):
        return rule(node, axes)
