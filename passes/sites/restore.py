"""Every token back where a consumer needs it: each pruned one with the value it had when it left, each merged one
with its own plus its destination's change.

It happens in the residual stream, so that the final norm and the head see like with like, and only on the
path to that consumer. In the middle of the network it is the sum at which `TokenAxis` ends.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from torch.fx import GraphModule, Node

from passes.axes.gather import original_positions
from passes.axes.token_axis import WAY_OUT, TokenAxis
from passes.graph.base import Check, Pass, PassResult, Refusal
from passes.graph.codes import Code
from passes.graph.facts import Fact
from passes.graph.layout import Part, tokens_in
from passes.graph.splice import splice
from passes.sites.contract import put_back_nowhere, retargeted
from passes.sites.site import SITE, Site

KEPT: Fact[dict[int, list[Node]]] = Fact("kept")  # of graphs: for each short output leaf the selections it went through


class TokenOutput(NamedTuple):
    """An output that carries tokens, left short: `tokens` [B, K, ...] and their original positions `kept` [B, K]."""

    tokens: Tensor
    kept: Tensor


@dataclass(frozen=True)
class RestoreTokens(Pass):
    """Gives consumers that need every token a restored stream, or the output its short one.

    Args:
        streams: sums of residual branches, where tokens may be put back.
        compact_outputs: leave outputs short, with the kept positions.
    """

    requires: ClassVar[tuple[Check, ...]] = (retargeted,)
    ensures: ClassVar[tuple[Check, ...]] = (put_back_nowhere,)

    streams: Collection[Node] = ()
    compact_outputs: bool = False

    @property
    def changes_outputs(self) -> bool:
        return self.compact_outputs

    def call(self, gm: GraphModule) -> PassResult:
        site = SITE.of(gm)
        assert site.axis is not None
        if site.stream_is_full:
            site.restored[site.full] = site.stream
        site.restored |= {n: n for n in (*site.axis.sources, *site.beside)}  # these have every token
        count = 0
        for consumer in site.axis.dense:
            if consumer.op == "output" and self.compact_outputs:
                _shorten(gm, site, consumer)
                continue
            for value in [n for n in consumer.all_input_nodes if n in site.axis.layouts]:
                with_all = self._dense(gm, site, value, consumer)
                consumer.replace_input_with(value, with_all)
                count += 1
        return PassResult(gm, rewrites=count)

    def _dense(self, gm: GraphModule, site: Site, value: Node, consumer: Node) -> Node:
        """The full-length form of a value, computed from the restored stream."""
        if value in site.restored:
            return site.restored[value]
        axis = site.axis
        assert axis is not None
        if value is site.full or is_stream(site.layout, axis, value, self.streams):
            with gm.graph.inserting_before(value.next):
                back = site.back(gm.graph, site.compact[value])
            site.restored[value] = back
            return back
        refuse_mixed(axis, value, consumer)
        for n in value.all_input_nodes:
            if n in axis.layouts:
                value.replace_input_with(n, self._dense(gm, site, n, consumer))
        site.restored[value] = value
        return value


def is_stream(layout: Any, axis: TokenAxis, value: Node, streams: Collection[Node]) -> bool:
    """Whether tokens may be put back into this value: a residual sum over the pruned sequence."""
    return value in streams and axis.layouts.get(value) == layout


def refuse_mixed(axis: TokenAxis, value: Node, consumer: Node) -> None:
    """Refuses where the way back from a consumer of every token to the stream crosses a mixing of tokens."""
    if axis.transfers[value].mixes:
        reason = axis.dense[consumer]
        raise Refusal(
            f"its result is read at full length ({reason}), but it comes from an op that mixes tokens",
            value,
            WAY_OUT,
            code=Code.EVERY_TOKEN,
        )


def _shorten(gm: GraphModule, site: Site, output: Node) -> None:
    """Lets the output read the compact values, and notes for each the selections it went through."""
    axis = site.axis
    assert axis is not None
    kept = KEPT.first(gm, {})
    leaves: Any = output.args[0]
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Node) or leaf not in axis.layouts:
            continue
        over = [t for d in axis.layouts[leaf] if (t := tokens_in(d))]
        if any(isinstance(t, Part) for t in over):
            raise Refusal(
                "an output has its tokens on a grid, and those left have none", leaf, WAY_OUT, code=Code.OUTPUTS
            )
        if len(over) != 1 or not over[0].same_sequence(site.tokens):
            raise Refusal("an output runs over another sequence than the pruned one", leaf, WAY_OUT, code=Code.OUTPUTS)
        kept.setdefault(i, []).append(site.index)
    output.args = (tuple(site.compact.get(n, n) if isinstance(n, Node) else n for n in leaves),)


@dataclass(frozen=True)
class AppendKept(Pass):
    """Appends to the outputs, for each short one, its kept original positions."""

    @property
    def changes_outputs(self) -> bool:
        return True

    def call(self, gm: GraphModule) -> PassResult:
        output = next(iter(reversed(gm.graph.nodes)))
        kept = KEPT.get(gm) or {}
        with gm.graph.inserting_before(output):
            extra = [splice(gm.graph, "select", original_positions, *kept[i]) for i in sorted(kept)]
        leaves: Any = output.args[0]
        output.args = ((*leaves, *extra),)
        return PassResult(gm, rewrites=len(extra))
