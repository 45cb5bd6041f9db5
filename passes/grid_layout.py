"""Where a value holds the rows and columns of a map that is cut, and the table of what ops do to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeAlias

from torch.fx import Node


@dataclass(frozen=True)
class Grid:
    """Where a value holds the rows and columns of the map that was cut.

    Args:
        rows, columns: the dimensions; None for an axis that a reduction ended.
        step: rows and columns of the cut map from one row or column of this value to the next.
        start: the row and column of the cut map that this value's first ones are centred on.
        mixed: a cell depends on other cells of the cut map.
    """

    rows: int | None = 2
    columns: int | None = 3
    step: tuple[int, int] = (1, 1)
    start: tuple[Fraction, Fraction] = (Fraction(0), Fraction(0))
    mixed: bool = False

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(d for d in (self.rows, self.columns) if d is not None)


@dataclass(frozen=True)
class Follow:
    """What an op does to the grid axes.

    Args:
        out: the result's grid, a tuple of them for a tuple result, None where it has none any more.
        aligned: inputs from before the cut that have an entry per cell and are cut alike.
    """

    out: Grid | tuple[Grid | None, ...] | None
    aligned: tuple[Node, ...] = ()


@dataclass
class GridAxes:
    """What the analysis found downstream of `start`.

    Args:
        start: the map whose rows and columns are followed.
        grids: for each value that holds them, where (a tuple for a tuple value).
        follows: for each op that was carried through, what it does; includes ops that end the axes.
        dense: consumers that need every row and column: outputs, and what restores an earlier cut.
    """

    start: Node
    grids: dict[Node, Any] = field(default_factory=dict)
    follows: dict[Node, Follow] = field(default_factory=dict)
    dense: list[Node] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of `start`."""
        return tuple(self.start.meta["val"].shape[2:])

    def grid(self, node: Any) -> Any:
        """The grid of an input that holds rows and columns, else None."""
        return self.grids.get(node) if isinstance(node, Node) else None


Rule: TypeAlias = Callable[[Node, GridAxes], Follow]
GRID_RULES: dict[Any, Rule] = {}


def grid_rules_for(*ops: Any) -> Callable[[Rule], Rule]:
    """Decorator: one rule for several ops."""

    def add(rule: Rule) -> Rule:
        GRID_RULES.update(dict.fromkeys(ops, rule))
        return rule

    return add
