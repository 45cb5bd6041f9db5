"""Biases added to scores that are viewed as rows and columns, [..., qh, qw, kh, kw], and viewed back (SAM).

They are summed first and viewed as [..., Nq, Nk], so that the scores are as the matcher of attention expects them.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node

from passes.attention.attention_pattern import CASTS, RESHAPES, SAME
from passes.graph.contraction import Contraction
from passes.graph.ops import arguments, aten_name, sizes_of
from passes.graph.splice import splice


def view_biases(gm: GraphModule) -> int:
    """Takes such views off the scores of every softmax; returns of how many."""
    count = 0
    for softmax in list(gm.graph.nodes):
        if aten_name(softmax) not in ("softmax", "_softmax"):
            continue
        back: Any = arguments(softmax)["self"]
        while aten_name(back) in CASTS | SAME:
            back = back.all_input_nodes[0]
        found = _scores(back.args[0], back) if aten_name(back) in RESHAPES else None
        if found is None or len(back.users) > 1 or not found[1]:
            continue
        if (sizes_of(back) or ())[-1:] == (sizes_of(back.args[0]) or ())[-1:]:  # heads apart from samples: as it is
            continue
        scores, terms = found
        viewed, flat = ([-1 if isinstance(n, SymInt) else n for n in v.meta["val"].shape] for v in (back.args[0], back))
        biased = partial(_biased, viewed, flat, [sign for _, sign in terms])
        with gm.graph.inserting_before(back):
            new = splice(gm.graph, "bias", biased, scores, *(n for n, _ in terms))
        new.meta |= {key: back.meta[key] for key in ("stack_trace", "nn_module_stack") if key in back.meta}
        back.replace_all_uses_with(new)
        gm.graph.eliminate_dead_code()
        count += 1
    return count


def _biased(viewed: list[int], flat: list[int], signs: list[int], scores: Tensor, *biases: Tensor) -> Tensor:
    total = reduce(torch.add, [b if sign > 0 else -b for b, sign in zip(biases, signs, strict=True)])
    total = total[(None,) * (len(viewed) - total.dim())]
    return scores + total.expand(viewed).reshape(flat)


def _scores(node: Any, back: Node) -> tuple[Node, list[tuple[Node, int]]] | None:
    """The scores behind sums on their view, where they are viewed back to their sizes; the terms and their signs."""
    if not isinstance(node, Node) or len(node.users) > 1:
        return None
    if aten_name(node) in RESHAPES:
        scores: Any = node.args[0]
        return (scores, []) if sizes_of(scores) == sizes_of(back) and _product(scores) else None
    if aten_name(node) not in ("add", "sub") or arguments(node)["alpha"] != 1:
        return None
    a, b = arguments(node)["self"], arguments(node)["other"]
    for first, other in [(a, b), (b, a)] if aten_name(node) == "add" else [(a, b)]:
        if isinstance(first, Node) and isinstance(other, Node) and sizes_of(first) == sizes_of(node):
            found = _scores(first, back)
            if found is not None and isinstance(other.meta.get("val"), Tensor):
                return found[0], [*found[1], (other, 1 if aten_name(node) == "add" else -1)]
    return None


def _product(node: Node) -> bool:
    """Whether scores are Q K^T, scaled or cast: one view of them among the terms, not a bias that is viewed alike."""
    while aten_name(node) in CASTS | SAME | {"mul", "div"} | RESHAPES:
        node = node.all_input_nodes[0]
    return Contraction.of(node) is not None
