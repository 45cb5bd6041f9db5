"""Where a value holds the rows and columns of a map that is cut, and the table of what ops do to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, TypeAlias

import torch
from torch.fx import Node

from passes.axes.rules.registry import Untransferable
from passes.graph.codes import Code
from passes.graph.layout import expr
from passes.graph.ops import checked_operator


@dataclass(frozen=True)
class Grid:
    """Where a value holds the rows and columns of the map that was cut.

    Args:
        rows: the dimension of the rows; None where a reduction ended it.
        columns: that of the columns; the same one where both are folded into it.
        step: rows and columns of the cut map from one row or column of this value to the next.
        start: the row and column of the cut map that this value's first ones are centred on.
        mixed: a cell depends on other cells of the cut map.
        parted: it holds some samples only, or more of them, or in another order.
    """

    rows: int | None = 2
    columns: int | None = 3
    step: tuple[int, int] = (1, 1)
    start: tuple[Fraction, Fraction] = (Fraction(0), Fraction(0))
    mixed: bool = False
    parted: bool = False

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(d for d in (self.rows, self.columns) if d is not None))


@dataclass(frozen=True)
class Follow:
    """What an op does to the grid axes.

    Args:
        out: the result's grid, a tuple of them for a tuple result, None where it has none any more.
        aligned: inputs from before the cut that have an entry per cell and are cut alike.
        sizes: places in the op's list of sizes that are the number of rows, columns or cells, to be rewritten.
        period: the op's arguments are right where rows and columns shrink by multiples of these.
        fixed: the result is a grid of a fixed size instead.
        apart: its inputs may be maps of different sizes.
    """

    out: Grid | tuple[Grid | None, ...] | None
    aligned: tuple[Node, ...] = ()
    sizes: tuple[tuple[int, Literal["rows", "columns", "cells"]], ...] = ()
    period: tuple[int, int] = (1, 1)
    fixed: bool = False
    apart: bool = False


@dataclass
class GridAxes:
    """What the analysis found downstream of `start`.

    Args:
        start: the map whose rows and columns are followed.
        grids: for each value that holds them, where (a tuple for a tuple value).
        sizes: for each such value how many rows and columns.
        follows: for each op that was carried through, what it does; includes ops that end the axes.
        dense: consumers that need every row and column: outputs, and what restores an earlier cut.
        fixed: values made from the map pooled to a grid of a fixed size.
    """

    start: Node
    grids: dict[Node, Any] = field(default_factory=dict)
    sizes: dict[Node, tuple[int, int]] = field(default_factory=dict)
    follows: dict[Node, Follow] = field(default_factory=dict)
    dense: list[Node] = field(default_factory=list)
    fixed: set[Node] = field(default_factory=set)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of `start`."""
        return self.sizes[self.start]

    def put(self, node: Node, grid: Any) -> None:
        """Notes where a value holds rows and columns."""
        self.grids[node] = grid
        self.sizes[node] = size_of(node, grid, self.sizes)

    def grid(self, node: Any) -> Any:
        """The grid of an input that holds rows and columns, else None."""
        return self.grids.get(node) if isinstance(node, Node) else None

    def sample_for_sample(self, node: Node) -> bool:
        """Whether dimension 0 of a value that holds rows and columns has the samples of `start`."""
        first, whole = (n.meta["val"].shape[0] for n in (node, self.start))
        return expr(first) == expr(whole) and not self.grids[node].parted

    @property
    def fitting(self) -> str:
        """How many rows and columns can leave so that every layer's map loses its share of them."""
        steps = [g.step for grids in self.grids.values() for g in (grids if isinstance(grids, tuple) else [grids]) if g]
        rows, columns = (math.lcm(*(step[i] for step in steps)) for i in (0, 1))
        return f"let a multiple of {rows} rows and of {columns} columns leave"


def size_of(node: Node, grid: Any, sizes: Mapping[Node, tuple[int, int]]) -> tuple[int, int]:
    """Rows and columns of a value: its own dimensions, or those of the input that it was folded or made from."""
    if isinstance(grid, Grid) and grid.rows is not None and grid.columns not in (None, grid.rows):
        rows, columns = (node.meta["val"].shape[d] for d in grid.dims)
        return rows, columns
    return next(sizes[n] for n in node.all_input_nodes if n in sizes)


Rule: TypeAlias = Callable[[Node, GridAxes], Follow]
GRID_RULES: dict[Any, Rule] = {}


def grid_rules_for(*ops: Any) -> Callable[[Rule], Rule]:
    """Decorator: one rule for several ops."""

    def add(rule: Rule) -> Rule:
        GRID_RULES.update(dict.fromkeys(ops, rule))
        return rule

    return add


def register_grid_rule(op: Any, rule: Rule) -> None:
    """Says what an op does to the rows and columns of a map, for custom ops and for ops that have no rule yet.

    Args:
        op: one overload, all of an op, or what `torch.library.custom_op` returned.
        rule: takes the fx node and `GridAxes`, returns a `Follow`, or raises `Untransferable(reason)`.

    Raises:
        TypeError: `op` is no op.
    """
    GRID_RULES[checked_operator(op)] = rule


def carried(node: Node, axes: GridAxes) -> Grid:
    """The grid of the first input, which must be the only one that holds it."""
    grid = axes.grid(node.args[0])
    if not isinstance(grid, Grid) or sum(n in axes.grids for n in node.all_input_nodes) != 1:
        raise Untransferable("the rows and columns do not come in by its first input alone", code=Code.OTHER_SEQUENCE)
    return grid


def rule_for(target: Any) -> Rule | None:
    """The rule of an op, its packet's, or the pointwise rule where torch tags it so."""
    if target in GRID_RULES:
        return GRID_RULES[target]
    if isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable:
        if target.overloadpacket in GRID_RULES:
            return GRID_RULES[target.overloadpacket]
        if torch.Tag.pointwise in target.tags:
            return GRID_RULES["pointwise"]
    return None
