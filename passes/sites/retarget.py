"""The rest of the network on the short sequence: each op that carries the token axis gets a compact twin."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch.fx import GraphModule, Node

from passes.axes.gather import original_positions, stretch_index, take
from passes.axes.rules import Extent, Kept, Position, Transfer
from passes.axes.token_axis import WAY_OUT, follow
from passes.graph.base import ALIVE, Check, Pass, PassResult, Refusal
from passes.graph.codes import Code
from passes.graph.facts import Fact
from passes.graph.fake import evaluate
from passes.graph.layout import LAYOUTS, Batch, Dim, Layout, Part, Tokens, expr, factor_size, over_samples, tokens_in
from passes.graph.ops import SDPA, SOFTMAX
from passes.graph.splice import fake, fake_mode, splice
from passes.sites.contract import open_site, retargeted
from passes.sites.site import SITE, Site
from passes.sites.sizes import KEY_SIZES, MEAN_SIZES, check_biasable, stretch_sizes

aten = torch.ops.aten
Gap = Literal["compact", "decay"]
TAKEN: Fact[Taken] = Fact("taken")  # of nodes: the Taken of a value that was gathered by kept positions
MEANS = {aten.mean.dim, aten.adaptive_avg_pool1d.default}


@dataclass(frozen=True)
class RetargetTokens(Pass):
    """Gives every op behind the inserted selection its compact form.

    Literal sizes follow from layouts, inputs that pair up with tokens are gathered by each sample's kept
    positions. A value that stops running over tokens replaces its original; ops that need every token keep
    reading the originals, for `RestoreTokens`.

    Args:
        anchors: sums of the network's residual branches (see `follow`).
        streams: those of this residual stream; None where outputs are left short (see `follow`).
        gap: what an op that carries a state along the sequence (a scan) does where tokens are gone. "compact":
            the kept tokens are a shorter sequence. "decay": the state decays as over the tokens that are gone, as
            far as the op's rule knows how (`Transfer.decay`).
    """

    requires: ClassVar[tuple[Check, ...]] = (open_site,)
    ensures: ClassVar[tuple[Check, ...]] = (retargeted,)

    leaves_dead_code: ClassVar[bool] = True

    anchors: Collection[Node] = ()
    streams: Collection[Node] | None = None
    gap: Gap = "compact"

    def call(self, gm: GraphModule) -> PassResult:
        site = SITE.of(gm)
        beside = {value: layout for value, (layout, _) in site.beside.items()}
        axis = site.axis = follow(gm, site.full, site.layout, site.batch, self.anchors, self.streams, beside)
        LAYOUTS.put(gm, axis.layouts)
        in_turn = next((n for n, t in axis.transfers.items() if t.ordered), None)
        if in_turn is not None and not site.in_order:
            raise Refusal(
                "depends on the order of the tokens, which this merger changes",
                in_turn,
                "use Schedule(by=Stream()), which keeps it, or prune instead of merging",
                code=Code.NO_MERGE,
            )
        decaying = [n for n, t in axis.transfers.items() if self.gap == "decay" and t.decay is not None]
        if self.gap == "decay" and not decaying:
            raise Refusal(
                "behind it no op carries a state that could decay over the gaps of pruned tokens",
                site.stream,
                'use Schedule(gap="compact")',
                code=Code.UNREAD_OPTION,
            )
        emit = _Emitter(gm, site)
        site.compact |= {site.full: site.short, **{value: short for value, (_, short) in site.beside.items()}}
        for source, layout in axis.sources.items():
            with gm.graph.inserting_before(source.next):
                site.compact[source] = emit.gathered(source, layout)
        for node, transfer in axis.transfers.items():
            emit(node, replace(transfer, args=transfer.decay) if node in decaying else transfer)
        return PassResult(gm, rewrites=len(axis.transfers))


@dataclass(frozen=True)
class Taken:
    """How a value with an entry per token was gathered.

    Args:
        source: what it was gathered from.
        target: layout that the source broadcasts to.
        gathered: dimensions of it.
        indices: kept positions [B, K] by the pieces of each token factor.
    """

    source: Node
    target: Layout
    gathered: tuple[int, ...]
    indices: dict[tuple[Any, ...], Node]


class _Emitter:
    """Emits compact twins in topological order."""

    def __init__(self, gm: GraphModule, site: Site) -> None:
        self.graph = gm.graph
        self.site = site
        self.mode = fake_mode(gm.graph)
        self.indices: dict[Any, Node] = {site.tokens.pieces: site.index}
        self.sizes: dict[Any, Node] = {site.tokens.pieces: site.sizes} if site.sizes is not None else {}
        self.taken: dict[Any, Node] = {}
        self.chained: dict[tuple[Node, tuple[Any, ...]], Node] = {}
        self.replaced: dict[Node, Node] = {}  # values that run over tokens no more
        self.samples: Node | None = None
        self.one_sample = over_samples(site.layout) is None

    def __call__(self, node: Node, transfer: Transfer) -> None:
        with self.graph.inserting_before(node):
            aligned = {self.replaced.get(n, n): target for n, target in transfer.aligned.items()}
            swapped = {n: self._aligned(n, target) for n, target in aligned.items()}
            given = (
                node.args if transfer.args is None else transfer.args,
                node.kwargs if transfer.kwargs is None else dict(transfer.kwargs),
            )
            args, kwargs = self._argument(given, swapped)
            op: Any = transfer.target or node.target
            twin = self.graph.call_function(op, args, kwargs)
        kept = ("stack_trace", "nn_module_stack", "torch_fn", KEY_SIZES.name, MEAN_SIZES.name)
        twin.meta = {k: v for k, v in node.meta.items() if k in kept}
        self._evaluate(node, twin, transfer)
        if self.site.sizes is not None:
            self._note_sizes(node, twin, transfer)
        assert self.site.axis is not None
        if node in self.site.axis.layouts:
            self.site.compact[node] = twin
        else:
            node.replace_all_uses_with(twin)
            self.replaced[node] = twin

    def _evaluate(self, node: Node, twin: Node, transfer: Transfer) -> None:
        """Recomputes the value, and holds it against the layout that the rule promised."""
        try:
            op: Any = twin.target
            twin.meta["val"] = evaluate(self.mode, op, fake(twin.args), fake(twin.kwargs))
        except Exception as error:
            raise Refusal(
                f"does not run on the short sequence: {str(error).splitlines()[0]}", node, WAY_OUT, code=Code.WRONG_RULE
            ) from error
        val = twin.meta["val"]
        if not isinstance(val, torch.Tensor) or transfer.out is None:
            return
        out: Any = transfer.out
        promised = [self._extent(dim) for dim in out]
        if len(promised) != val.dim() or any(p - expr(s) != 0 for p, s in zip(promised, val.shape, strict=True)):
            raise Refusal(
                f"gives {tuple(val.shape)} on the short sequence, not {promised}", node, WAY_OUT, code=Code.WRONG_RULE
            )

    def _note_sizes(self, node: Node, twin: Node, transfer: Transfer) -> None:
        """Where a merged token counts for what it stands for: as a key of attention, and in a mean."""
        assert self.site.axis is not None and self.site.sizes is not None
        layouts = self.site.axis.layouts
        source = node.args[0] if node.args else None
        layout = layouts.get(source) if isinstance(source, Node) else None
        if node.target is SDPA and self.site.size_bias:
            key: Any = node.args[1]
            if key in layouts and (keys := tokens_in(layouts[key][-2])):
                out: Any = transfer.out
                check_biasable(node, out, self.one_sample)
                KEY_SIZES.put(twin, self._sizes(keys))
        elif node.target in SOFTMAX and self.site.size_bias and transfer.mixes:
            raise Refusal(
                "attention that is not scaled_dot_product_attention takes no size bias",
                node,
                "use Schedule(by=Stream(size_bias=False)), or prune instead of merging",
                code=Code.SIZES,
            )
        elif node.target in MEANS and self.site.weighted_mean and transfer.mixes and layout is not None:
            tokens = next(d for d, dim in enumerate(layout) if tokens_in(dim))
            samples = over_samples(layout)
            alone = self.one_sample if samples is None else len(layout[samples]) == 1
            over = tokens_in(layout[tokens])
            if not alone or over is None or isinstance(over, Part):
                raise Refusal(
                    "a mean over tokens folded with samples, or on a grid",
                    node,
                    "use Schedule(weighted_mean=False)",
                    code=Code.SIZES,
                )
            MEAN_SIZES.put(twin, (self._sizes(over), samples, tokens))

    def _sizes(self, tokens: Tokens) -> Node:
        """The sizes [B, K] along a sequence made of the site's prunable stretch."""
        if tokens.pieces not in self.sizes:
            with self.graph.inserting_before(self.site.full.next):
                self.sizes[tokens.pieces] = splice(
                    self.graph,
                    "sizes",
                    lambda n: stretch_sizes(n, self.site.tokens, tokens.pieces),
                    self.site.sizes,
                )
            ALIVE.put(self.sizes[tokens.pieces], True)
        return self.sizes[tokens.pieces]

    def _extent(self, dim: Dim) -> Any:
        """The compact size of a dimension, as an expression."""
        size = expr(1)
        for f in dim:
            size *= f.compact(self.site.left) if isinstance(f, Tokens) else factor_size(f)
        return size

    def _argument(self, given: Any, swapped: dict[Node, Node]) -> Any:
        """An argument with compact inputs and sizes; Extent, Position and Kept stand inside lists and tuples."""
        if isinstance(given, (tuple, list)):
            items = [self._argument(a, swapped) for a in given]
            return items if isinstance(given, list) else tuple(items)
        if isinstance(given, dict):
            return {k: self._argument(a, swapped) for k, a in given.items()}
        if isinstance(given, Node):
            given = self.replaced.get(given, given)
            return swapped.get(given, self.site.compact.get(given, given))
        if isinstance(given, Kept):
            kept = tokens_in(given.dim)
            assert kept is not None
            return self._index(kept)
        if isinstance(given, Extent):
            return self._size(given.dim)
        if isinstance(given, Position):
            border = given.tokens.border(given.at)
            assert border is not None
            return border[0] + border[1] * self.site.left
        return given

    def _size(self, dim: Dim) -> Any:
        """The compact size of a dimension, as an argument: an int, or a node where it depends on the batch."""
        whole, rest = self._extent(dim), self._extent(tuple(f for f in dim if not isinstance(f, Batch)))
        if whole.is_Integer:
            return int(whole)
        if rest.free_symbols:
            raise Refusal("a size depends on a second batch", self.site.stream, WAY_OUT, code=Code.DATA_DEPENDENT)
        if not any(isinstance(f, Batch) for f in dim):
            return int(rest)
        if self.samples is None:
            at = over_samples(self.site.layout)
            assert at is not None
            with self.graph.inserting_before(self.site.full.next):
                self.samples = splice(self.graph, "batch size", lambda x: x.shape[at], self.site.stream)
        if rest == 1:
            return self.samples
        product = self.graph.call_function(operator.mul, (self.samples, int(rest)))
        product.meta["val"] = self.samples.meta["val"] * int(rest)
        return product

    def _aligned(self, node: Node, target: Layout) -> Node:
        """An input that has an entry per token, gathered by the kept positions."""
        assert self.site.axis is not None
        return self.gathered(self.site.compact.get(node, node), target, self.site.axis.layouts.get(node))

    def gathered(self, node: Node, target: Layout, own: Layout | None = None) -> Node:
        """A value gathered along the dimensions that run over tokens in `target`, and in its `own` layout not yet."""
        shape = node.meta["val"].shape
        offset = len(target) - len(shape)
        gathered = tuple(
            d
            for d, dim in enumerate(target)
            if tokens_in(dim)
            and d >= offset
            and not (isinstance(shape[d - offset], int) and shape[d - offset] == 1)
            and (own is None or not tokens_in(own[d - offset]))
        )
        key = (node, target, gathered)
        if key not in self.taken:
            taken = self._taken(node, target, gathered)

            def gather(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
                return take(x, taken.target, gathered, dict(zip(taken.indices, given, strict=True)))

            self.taken[key] = splice(self.graph, "gather", gather, taken.source, *taken.indices.values())
            TAKEN.put(self.taken[key], taken)
        return self.taken[key]

    def _taken(self, node: Node, target: Layout, gathered: tuple[int, ...]) -> Taken:
        """What to gather: where an earlier site gathered the same dimensions, its source, so that it is done once."""
        now = {d: t for d in gathered if (t := tokens_in(target[d]))}
        earlier = TAKEN.get(node)
        if (
            earlier is None
            or not gathered
            or (earlier.gathered, len(earlier.target)) != (gathered, len(target))
            or any(isinstance(t, Part) for t in now.values())
        ):
            return Taken(node, target, gathered, {t.pieces: self._index(t) for t in now.values()})
        then = {d: tokens_in(earlier.target[d]) for d in gathered}
        indices = {t.pieces: self._both(earlier.indices[t.pieces], now[d]) for d, t in then.items() if t}
        return Taken(earlier.source, earlier.target, gathered, indices)

    def _both(self, first: Node, tokens: Tokens) -> Node:
        """Where the kept positions of a sequence are in the one it was taken out of by `first`."""
        if (first, tokens.pieces) not in self.chained:
            then = self._index(tokens)
            with self.graph.inserting_before(then.next):
                self.chained[first, tokens.pieces] = splice(self.graph, "select", original_positions, first, then)
        return self.chained[first, tokens.pieces]

    def _index(self, tokens: Tokens) -> Node:
        """The kept positions along a sequence made of the site's prunable stretch."""
        if tokens.pieces not in self.indices:
            with self.graph.inserting_before(self.site.full.next):
                self.indices[tokens.pieces] = splice(
                    self.graph,
                    "select",
                    lambda i: stretch_index(i, self.site.tokens, tokens.pieces),
                    self.site.index,
                )
        return self.indices[tokens.pieces]
