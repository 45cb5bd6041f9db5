"""The transfer rules of tokens, and of rows and columns, by family of op."""

from passes.axes.rules import contractions, maps, pointwise, reductions, tokens, views, windows
from passes.axes.rules.registry import (
    Context,
    Extent,
    Kept,
    MapContext,
    Position,
    Transfer,
    Untransferable,
    register_grid_rule,
    register_token_rule,
    rule_for,
)

__all__ = [
    "Context",
    "Extent",
    "Kept",
    "MapContext",
    "Position",
    "Transfer",
    "Untransferable",
    "contractions",
    "maps",
    "pointwise",
    "reductions",
    "register_grid_rule",
    "register_token_rule",
    "rule_for",
    "tokens",
    "views",
    "windows",
]
