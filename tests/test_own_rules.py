"""Rules of users' own ops: for maps, and taken back at the end of a scope."""

from __future__ import annotations

import pytest
import torch
from graphs import graph_of
from torch import Tensor
from torch.fx import Node

import rs_compile
from passes.axes.grid import Grid, follow_grid
from passes.graph.base import Refusal
from passes.graph.cost import count
from rs_compile import rules
from rs_compile.rules import Context, Transfer


@torch.library.custom_op("rs_own::tint", mutates_args=())
def tint(x: Tensor) -> Tensor:
    """Of each cell of a map [B, C, H, W] its channels the other way round."""
    return x.flip(1)


@tint.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def cell_by_cell(node: Node, ctx: Context) -> Transfer:
    return Transfer(ctx.layout(node.args[0]))


def test_a_grid_rule_and_its_end() -> None:
    gm = graph_of(lambda x: tint(x).mean((2, 3)), torch.randn(2, 4, 6, 6))
    (op,) = (n for n in gm.graph.nodes if "tint" in str(n.target))
    with rules.scoped():
        rules.register_grid_rule(tint, cell_by_cell)
        rules.register_cost(tint, lambda out, x: 7)
        assert follow_grid(next(iter(gm.graph.nodes))).grid(op) == Grid()
        assert count(gm).between([op]).macs == 7
    with pytest.raises(Refusal, match="no rule says what this op does"):
        follow_grid(next(iter(gm.graph.nodes)))
    assert count(gm).between([op]).macs == 0


def test_what_an_author_needs_comes_from_one_place() -> None:
    assert rs_compile.register_token_rule is rules.register_token_rule
    assert all(hasattr(rules, name) for name in rules.__all__)
    with pytest.raises(TypeError, match="'tint' is no op; pass"):
        rules.register_grid_rule("tint", cell_by_cell)
