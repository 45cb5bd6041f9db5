"""Of a mixer that runs along the tokens in both directions, the part that runs backward."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch._ops import OpOverload
from torch.fx import Node

from passes.graph.ops import arguments
from passes.network.branches import Block, unscaled

aten = torch.ops.aten


def backward_term(block: Block) -> Node | None:
    """Of the sum of two scans that the mixer's last linear layer reads, scaled or not, the one that runs backward.

    Only what makes it, and not the other term, flips the tokens or is told to run in `reverse`.
    """
    gated = block.gated()
    total = gated and unscaled(gated)
    if total is None or total.target is not aten.add.Tensor:
        return None
    terms = [a for a in total.args if isinstance(a, Node)]
    if len(terms) != 2:
        return None
    made = [_made_by(term, block.mlp.nodes) for term in terms]
    backward = [t for t, own in zip(terms, made, strict=True) if any(_turns(n) for n in own - (made[0] & made[1]))]
    return backward[0] if len(backward) == 1 else None


def _made_by(node: Node, among: Collection[Node]) -> set[Node]:
    found, open_ = set[Node](), [node]
    while open_:
        n = open_.pop()
        if n in among and n not in found:
            found.add(n)
            open_ += n.all_input_nodes
    return found


def _turns(node: Node) -> bool:
    if node.target is aten.flip.default:
        return True
    return isinstance(node.target, OpOverload) and arguments(node).get("reverse") is True
