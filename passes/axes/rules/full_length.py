"""A product whose other factor has an entry per row, column or token, and no dimension for samples.

To gather that factor would give each sample a table of its own, larger than all else in the layer. Where a token's
result depends on that token alone, the product runs as the model wrote it, each token that is left in its place, and
theirs are taken out of the result. What stands in the places of those that are gone is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from passes.axes.gather import in_place, take
from passes.axes.rules.pointwise import Ungatherable, align, tensors
from passes.axes.rules.registry import Context, Kept, Transfer, rules_for
from passes.graph.layout import Batch, Layout, Part, Tokens, sequence_in, tokens_in


@dataclass(frozen=True)
class Operand:
    """Stands in an op's arguments for one of its tensors."""

    at: int


@dataclass(frozen=True, eq=False)
class FullLength:
    """An op of the model, run on every token's place: a target of the graph until `WriteFullLength` writes it out.

    Args:
        op: the op.
        given: its arguments, with `Operand` in place of tensors.
        layouts: of each tensor that runs over tokens, with all of them; None for another.
        out: the same of the result.
    """

    op: Callable[..., Any]
    given: Any
    layouts: tuple[Layout | None, ...]
    out: Layout

    @property
    def __name__(self) -> str:
        """As fx writes it into a graph's code."""
        return "full_length"

    def __call__(self, index: Tensor, *operands: Tensor) -> Tensor:
        """The compact result on compact tensors; the tokens left have the places `index`, [B, K]."""
        pairs = zip(operands, self.layouts, strict=True)
        full = [x if layout is None else in_place(x, layout, index) for x, layout in pairs]
        result = self.op(*map_aggregate(self.given, lambda a: full[a.at] if isinstance(a, Operand) else a))
        over = [(d, t) for d, dim in enumerate(self.out) if (t := tokens_in(dim))]
        return take(result, self.out, [d for d, _ in over], {over[0][1].pieces: index})


def paired(
    node: Node, ctx: Context, out: Layout, sides: Sequence[tuple[Node, Layout]], summed: bool, mixes: bool
) -> Transfer:
    """A product whose factors pair up with tokens: gathered, or where they cannot be, read at full length.

    Args:
        node: the product.
        ctx: of its factors.
        out: the layout of the result.
        sides: the factors, with the layouts that they broadcast to.
        summed: it sums over tokens.
        mixes: see `Transfer`.
    """
    aligned: dict[Node, Layout] = {}
    try:
        for n, layout in sides:
            aligned |= align(ctx, [n], layout)
    except Ungatherable:
        placed = None if summed or node.kwargs else _placed(node, ctx, out)
        if placed is None:
            raise
        return replace(placed, beside=dict(sides), mixes=mixes)
    return Transfer(out, aligned, mixes=mixes)


def _placed(node: Node, ctx: Context, out: Layout) -> Transfer | None:
    """The product on every token's place, or None where the places are not those of one sequence, in samples."""
    inputs = tensors(node.args)
    layouts = tuple(ctx.layout(n) for n in inputs)
    carrying = [layout for layout in (*layouts, out) if layout is not None]
    over = [t for layout in carrying for dim in layout if (t := tokens_in(dim))]
    grids = [[dim for dim in layout if isinstance(tokens_in(dim), Part)] for layout in carrying]
    apart = all(len(grid) <= 2 and all(len(dim) == 1 for dim in grid) for grid in grids)
    samples = all(any(isinstance(f, Batch) for dim in layout for f in dim) for layout in carrying)
    if len({t.pieces for t in over}) != 1 or not apart or not samples:
        return None
    numbers: dict[Any, Any] = {n: Operand(i) for i, n in enumerate(inputs)}
    given = map_aggregate(node.args, lambda a: numbers.get(a, a) if isinstance(a, Node) else a)
    assert isinstance(node.target, torch._ops.OpOverload)
    places = Kept((Tokens(over[0].pieces),))
    return Transfer(out, target=FullLength(node.target, given, layouts, out), args=(places, *inputs), kwargs={})


@rules_for(FullLength)
def again(node: Node, ctx: Context) -> Transfer:
    """At a second site: fewer tokens are left, and their places are gathered like any entry per token."""
    how, (index, *operands) = node.target, node.args
    assert isinstance(how, FullLength) and isinstance(index, Node)
    own = {n: ctx.layout(n) for n in operands}
    left = next(t for layout in own.values() if layout is not None and (t := sequence_in(layout)))

    def now(layout: Layout) -> Layout:
        """The layout of the compact value, whose rows are the tokens that this site finds."""
        columns = [isinstance(t := tokens_in(dim), Part) and t.at == 1 for dim in layout]
        return tuple(
            () if gone else tuple(left if isinstance(f, Tokens) else f for f in dim)
            for gone, dim in zip(columns, layout, strict=True)
        )

    assert all(own[n] == (layout and now(layout)) for n, layout in zip(operands, how.layouts, strict=True))
    return Transfer(now(how.out), {index: ((ctx.batch,), (left,))}, mixes=True)
