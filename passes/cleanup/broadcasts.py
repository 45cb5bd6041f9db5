"""What is expanded only to meet a value of that size meets it as it is: elementwise ops broadcast by themselves.

`x * gate.expand_as(x)` names every size of x, which a shorter sequence or a smaller map no longer has; `x * gate` none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from passes.graph.aliasing import same_kind
from passes.graph.fake import evaluate
from passes.graph.ops import EXPANSIONS, SUMS, elementwise
from passes.graph.splice import fake, fake_mode

aten = torch.ops.aten
# a term may be the residual stream (queries that the model has learned), which has a sequence for each sample


def drop_expansions(graph: Graph) -> int:
    """Gives elementwise ops what was expanded for them, where their result is of the same kind; returns how many."""
    count = 0
    for node in list(graph.nodes):
        if node.target in EXPANSIONS:
            count += sum(_met_as_it_is(node, user) for user in list(node.users))
    return count


def _met_as_it_is(expanded: Node, user: Node) -> bool:
    target, source = user.target, expanded.args[0]
    if not isinstance(target, OpOverload) or not elementwise(target) or target in SUMS:
        return False
    if len(user.all_input_nodes) < 2:
        return False  # nothing else has its size

    def swapped(given: Any) -> Any:
        return map_arg(given, lambda n: source if n is expanded else n)

    args, kwargs = swapped(user.args), swapped(user.kwargs)
    before: Any = user.meta.get("val")
    try:
        after = evaluate(fake_mode(user.graph), target, fake(args), fake(kwargs))
    except Exception:  # it does not broadcast
        return False
    if not (same_kind(before, after) and isinstance(after, torch.Tensor) and before.dtype == after.dtype):
        return False
    user.args, user.kwargs = args, kwargs
    return True
