"""Side inputs that were normalised over tokens: weights made of positions alone, as ConViT mixes into its attention.

Their entries sum to one over all tokens, so they must not be gathered as they are: what the softmax read is, and the
softmax runs over the tokens that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from passes.axes.rules.pointwise import tensors
from passes.axes.rules.registry import rule_for
from passes.axes.rules.views import reshape
from passes.graph.layout import Layout, tokens_in
from passes.graph.ops import EXPANSIONS, SOFTMAX, argument, elementwise, permuted, shape_of, sizes_of, wrap
from passes.graph.regroup import regroup

aten = torch.ops.aten


@dataclass(frozen=True)
class Normalised:
    """A side input that comes out of a softmax over tokens.

    Args:
        source: what the softmax reads, with an entry per token.
        layout: of it.
        chain: the ops from the softmax to the side input, in order.
    """

    source: Node
    layout: Layout
    chain: tuple[Node, ...]


def normalised(side: Node, target: Layout, carries: Callable[[Node], bool]) -> Normalised | None:
    """The softmax over tokens behind a side input, through elementwise ops and views; None where there is none.

    Args:
        side: the input.
        target: the layout that it broadcasts to.
        carries: whether a value runs over tokens already.
    """
    todo: list[tuple[Node, Layout, tuple[Node, ...]]] = [(side, _of(side, target), ())]
    seen: set[Node] = set()
    while todo:
        node, layout, chain = todo.pop()
        if node in seen or carries(node):
            continue
        seen.add(node)
        if node.target not in SOFTMAX:
            todo += [(n, before, (node, *chain)) for n, before in _before(node, layout)]
        elif tokens_in(layout[wrap(argument(node, "dim"), len(layout))]):
            return Normalised(node.all_input_nodes[0], layout, (node, *chain))
    return None


def _of(node: Node, target: Layout) -> Layout:
    """The layout of a value that broadcasts to another."""
    sizes = sizes_of(node) or ()
    return tuple(() if size == 1 else dim for size, dim in zip(sizes, target[len(target) - len(sizes) :], strict=True))


def _before(node: Node, layout: Layout) -> list[tuple[Node, Layout]]:
    """What an elementwise op or a view of that layout reads, with its layout; nothing for another op."""
    inputs = tensors((node.args, node.kwargs))
    if elementwise(node.target) or node.target in EXPANSIONS:
        return [(n, _of(n, layout)) for n in inputs]
    order = permuted(node)
    if order is not None:
        return [(inputs[0], tuple(layout[order.index(d)] for d in range(len(order))))]
    before = regroup(layout, shape_of(inputs[0])) if rule_for(node.target) is reshape else None
    return [] if before is None else [(inputs[0], before)]
