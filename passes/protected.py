"""Tokens that must stay: class, register and distillation tokens, found from how the sequence was built.

A position whose token is not made from the image (it is a parameter) is protected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from passes.branches import ancestors, positions, stream_of
from passes.rules.pointwise import tensors
from passes.rules.registry import argument, shape_of, wrap
from passes.rules.views import permuted

aten = torch.ops.aten
_PER_TOKEN = {
    aten.layer_norm.default, aten.rms_norm.default, aten.dropout.default, aten.to.dtype, aten.to.dtype_layout,
    aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default,
}  # fmt: skip


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
    if node.target is aten.cat.default and wrap(argument(node, 1, "dim", 0), rank) == dim:
        return [origin for n in tensors(first) for origin in _origins(n, dim, sums, above)]
    if node.target is aten.slice.Tensor and isinstance(first, Node):
        full = _origins(first, dim, sums, above)
        if wrap(argument(node, 1, "dim", 0), rank) != dim:
            return full
        start = argument(node, 2, "start", 0) or 0
        return full[start : argument(node, 3, "end")][:size]
    if isinstance(first, Node) and (order := permuted(node)) is not None:
        return of(first, order[dim])
    if node.target is aten.expand.default and isinstance(first, Node) and len(shape_of(first)) == rank:
        return of(first, dim)
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    if pointwise or node.target in _PER_TOKEN:
        found = [
            of(n, dim - rank + len(shape_of(n)))
            for n in (tensors(node.args) if pointwise else tensors(first))
            if len(shape_of(n)) > rank - 1 - dim
        ]
        return [next((o for o in at if o is not None), None) for at in zip(*found, strict=True)]
    return [Origin(node, dim, i) for i in range(size)]
