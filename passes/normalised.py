"""Side inputs that were normalised over tokens: weights made of positions alone, as ConViT mixes into its attention.

Their entries sum to one over all tokens, so they must not be gathered as they are: what the softmax read is, and the
softmax runs over the tokens that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from passes.layout import Layout, tokens_in
from passes.rules.pointwise import elementwise, tensors
from passes.rules.registry import argument, shape_of, sizes_of, wrap

aten = torch.ops.aten
_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}


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
    """The softmax over tokens behind a side input, through ops that keep its shape; None where there is none.

    Args:
        side: the input.
        target: the layout that it broadcasts to.
        carries: whether a value runs over tokens already.
    """
    layout = target[len(target) - len(shape_of(side)) :]
    chain: list[Node] = []
    node = side
    while not carries(node):
        chain.append(node)
        same = [n for n in tensors((node.args, node.kwargs)) if sizes_of(n) == sizes_of(side)]
        if node.target in _SOFTMAX:
            over = wrap(argument(node, 1, "dim"), len(layout))
            return Normalised(same[0], layout, tuple(reversed(chain))) if tokens_in(layout[over]) else None
        pointwise = elementwise(node.target)
        if not pointwise or len(same) != 1:
            return None
        node = same[0]
    return None
