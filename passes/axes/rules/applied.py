"""One step of following tokens, rows and columns through a graph: an op's rule, and a check of what it says."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.axes.rules.registry import Context, Transfer, Untransferable, rule_faults, rule_for
from passes.graph.codes import Code
from passes.graph.layout import Batch, Layout, dim_size, expr, show, whole_grids


def transfer_of(node: Node, ctx: Context) -> Transfer:
    """What an op does, by its rule.

    Raises:
        Untransferable: it has none, its rule declines, or what the rule says does not explain the op's dense result.
    """
    rule = rule_for(node.target, ctx.rules)
    if rule is None:
        raise Untransferable(ctx.unknown, code=Code.NO_RULE)
    with rule_faults(node):
        transfer = rule(node, ctx)
    val = node.meta["val"]
    if transfer.out is not None:
        values = val if isinstance(val, (tuple, list)) else (val,)
        outs: Any = transfer.out if isinstance(val, (tuple, list)) else (transfer.out,)
        for value, out in zip(values, outs, strict=True):
            _check(value, out)
    return transfer


def _check(value: Any, layout: Layout | None) -> None:
    """A rule's layout must explain the shape that the op really has."""
    if layout is None or not isinstance(value, torch.Tensor):
        return
    if not whole_grids(layout):
        raise Untransferable("takes rows or columns of the tokens' grid by themselves", code=Code.EVERY_TOKEN)
    if sum(isinstance(f, Batch) for dim in layout for f in dim) > 1:
        raise Untransferable(
            "lets the samples of the batch meet, and each keeps tokens of its own", code=Code.SAMPLES_MEET
        )
    explained = [dim_size(dim) for dim in layout]
    if len(explained) != value.dim() or any(a - expr(b) != 0 for a, b in zip(explained, value.shape, strict=True)):
        raise Untransferable(
            f"the layout {show(layout)} does not explain the shape {tuple(value.shape)}", code=Code.WRONG_RULE
        )
