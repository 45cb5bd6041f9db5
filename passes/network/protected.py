"""Tokens that must stay: class, register and distillation tokens, found from how the sequence was built.

A position whose token is not made from the image (it is a parameter) is protected, and so is one at an end that
the end of the network picks by its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from passes.axes.rules.pointwise import tensors
from passes.axes.token_axis import TokenAxis, analyse, stream_layout
from passes.graph.base import Refusal
from passes.graph.layout import tokens_in
from passes.graph.ops import argument, elementwise, permuted, shape_of, wrap
from passes.network.branches import ancestors, positions, stream_of

aten = torch.ops.aten
_PER_TOKEN = {aten.layer_norm.default, aten.rms_norm.default}


@dataclass(frozen=True)
class Protected:
    """How many tokens at either end must stay, and which ones between."""

    prefix: int
    suffix: int
    extra: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return self.prefix + self.suffix + len(self.extra)

    @classmethod
    def of(cls, stay: list[bool]) -> Protected:
        prefix = next((i for i, s in enumerate(stay) if not s), len(stay))
        suffix = next((i for i, s in enumerate(stay[: prefix - 1 if prefix else None : -1]) if not s), 0)
        return cls(prefix, suffix, tuple(i for i in range(prefix, len(stay) - suffix) if stay[i]))


def find_protected(gm: GraphModule, stream: Node, dim: int) -> Protected:
    """The protected tokens of a residual stream.

    Args:
        stream: a value of it.
        dim: its token dimension.
    """
    return Protected.of([origin is None for origin in origins(gm, stream, dim)])


def with_picked(gm: GraphModule, stream: Node, found: Protected) -> Protected:
    """The protected tokens, and those next to them that the end of the network picks by their place.

    A class token that is a word of the sentence is not learned, but nothing behind the encoder reads another one.

    Args:
        stream: a value of the residual stream.
        found: see `find_protected`.
    """
    prefix, suffix = found.prefix, found.suffix
    while True:
        layout, batch = stream_layout(stream, prefix, suffix)
        count = next((t.dense for dim in layout if (t := tokens_in(dim))), 0)
        try:
            axis = analyse(gm, stream, layout, batch)
        except Refusal:  # said where tokens are to leave
            return found
        picked = {place for node in axis.dense if (place := _picked(node, axis)) is not None}
        more = (prefix + (prefix in picked), suffix + (count - 1 - suffix in picked))
        if more == (prefix, suffix):
            return Protected(prefix, suffix, tuple(i for i in found.extra if prefix <= i < count - suffix))
        if 2 * sum(more) > count:  # a loop over tokens
            return found
        prefix, suffix = more


def _picked(node: Node, axis: TokenAxis) -> int | None:
    """The token that an op picks out of the whole sequence, by its place."""
    if node.target is not aten.select.int:
        return None
    layout = axis.layouts[node.all_input_nodes[0]]
    over = layout[wrap(argument(node, "dim"), len(layout))]
    whole = [t for dim in axis.layouts[axis.start] if (t := tokens_in(dim))]
    return wrap(argument(node, "index"), whole[0].dense) if [*over] == whole else None


@dataclass(frozen=True)
class Origin:
    """Where a token comes from: a position along a dimension of the value at which its trail ends."""

    node: Node
    dim: int
    position: int


def origins(gm: GraphModule, stream: Node, dim: int) -> list[Origin | None]:
    """For each position along `dim` of a residual stream where its token comes from; None for learned tokens."""
    order, above = positions(gm), ancestors(gm)
    sums = {node: s for node in gm.graph.nodes if (s := stream_of(node, order, above)) is not None}
    return _origins(stream, dim, sums, above)


def _origins(node: Node, dim: int, sums: Mapping[Node, Node], above: Mapping[Node, int]) -> list[Origin | None]:
    while node in sums:
        node = sums[node]
    size = int(shape_of(node)[dim])
    if not (above[node] & 1):
        return [None] * size

    def of(n: Node, d: int) -> list[Origin | None]:
        found = _origins(n, d, sums, above)
        return found * size if len(found) == 1 else found

    first = node.args[0] if node.args else None
    rank = len(shape_of(node))
    if node.target is aten.cat.default and wrap(argument(node, "dim"), rank) == dim:
        return [origin for n in tensors(first) for origin in _origins(n, dim, sums, above)]
    if node.target is aten.slice.Tensor and isinstance(first, Node):
        full = _origins(first, dim, sums, above)
        if wrap(argument(node, "dim"), rank) != dim:
            return full
        start = argument(node, "start") or 0
        return full[start : argument(node, "end")][:size]
    if isinstance(first, Node) and (order := permuted(node)) is not None:
        return of(first, order[dim])
    if node.target is aten.expand.default and isinstance(first, Node) and len(shape_of(first)) == rank:
        return of(first, dim)
    if node.target is aten.repeat.default and isinstance(first, Node) and len(shape_of(first)) == rank:
        return _origins(first, dim, sums, above) * argument(node, "repeats")[dim]
    pointwise = elementwise(node.target)
    if pointwise or node.target in _PER_TOKEN:
        found = [
            of(n, dim - rank + len(shape_of(n)))
            for n in (tensors(node.args) if pointwise else tensors(first))
            if len(shape_of(n)) > rank - 1 - dim
        ]
        return [next((o for o in at if o is not None), None) for at in zip(*found, strict=True)]
    return [Origin(node, dim, i) for i in range(size)]
