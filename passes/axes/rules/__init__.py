"""The transfer rules of the token axis, by family of op."""

from passes.axes.rules import contractions, pointwise, reductions, tokens, views
from passes.axes.rules.registry import (
    Context,
    Extent,
    Kept,
    Position,
    Transfer,
    Untransferable,
    register_token_rule,
    rule_for,
)

__all__ = [
    "Context",
    "Extent",
    "Kept",
    "Position",
    "Transfer",
    "Untransferable",
    "contractions",
    "pointwise",
    "reductions",
    "register_token_rule",
    "rule_for",
    "tokens",
    "views",
]
