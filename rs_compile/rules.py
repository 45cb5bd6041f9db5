"""What the author of a rule for an op of their own needs: token rules, grid rules of CNNs, costs.

A token rule says what an op does to the dimensions that run over tokens, a grid rule what it does to the rows and
columns of a map. Either takes the fx node and a `Context`, and returns a `Transfer`, or raises
`Untransferable(reason)`; one function may be both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from passes.axes.rules.registry import (
    GRID_RULES,
    TOKEN_RULES,
    Context,
    Extent,
    Kept,
    Position,
    Transfer,
    Untransferable,
    register_grid_rule,
    register_token_rule,
)
from passes.graph.cost import Count, register_cost
from passes.graph.cost_rules import RULES as COST_RULES
from passes.graph.layout import Line

__all__ = [
    "Context",
    "Count",
    "Extent",
    "Kept",
    "Line",
    "Position",
    "Transfer",
    "Untransferable",
    "register_cost",
    "register_grid_rule",
    "register_token_rule",
    "scoped",
]


@contextmanager
def scoped() -> Iterator[None]:
    """Takes back, at its end, what was registered inside: for tests."""
    tables: list[dict[Any, Any]] = [TOKEN_RULES, GRID_RULES, COST_RULES]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, held in zip(tables, before, strict=True):
            table.clear()
            table.update(held)
