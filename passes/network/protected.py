"""Tokens that must stay: class, register and distillation tokens, found from how the sequence was built.

A position whose token is not made from the image (it is a parameter) is protected, and so is one at an end that
the end of the network picks by its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from passes.axes.token_axis import TokenAxis, analyse, stream_layout
from passes.graph.base import Refusal
from passes.graph.layout import tokens_in
from passes.graph.ops import argument, wrap
from passes.network.origins import origins

aten = torch.ops.aten


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


def find_protected(gm: GraphModule, stream: Node, *dims: int) -> Protected:
    """The protected tokens of a residual stream.

    Args:
        stream: a value of it.
        dims: its token dimension, or its rows and columns.

    Raises:
        Refusal: see `origins`.
    """
    stay = [origin is None for origin in origins(gm, stream, *dims)]
    # those on a grid lie in no row of their own, so none is a prefix
    return Protected.of(stay) if len(dims) == 1 else Protected(0, 0, tuple(i for i, s in enumerate(stay) if s))


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
