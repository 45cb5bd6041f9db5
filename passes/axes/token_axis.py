"""The token axis: from one value onwards, which dimensions of which values run over its tokens.

A forward dataflow analysis with one transfer rule per op (`passes.axes.rules`). It changes nothing. What it
cannot carry the axis through it records as a consumer that needs every token; where the rest of the
network depends on that consumer, it refuses (`Needed`), and `follow` then has every token come back before it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from passes.axes.normalised import Normalised, normalised
from passes.axes.rules import Context, Transfer, Untransferable
from passes.axes.rules.applied import transfer_of
from passes.capture.capture import FIXED_BATCH
from passes.graph.aliasing import Memory, writes
from passes.graph.base import Reason, Refusal
from passes.graph.codes import Code
from passes.graph.layout import (
    Batch,
    Dim,
    Fixed,
    Free,
    Layout,
    Prunable,
    Tokens,
    expr,
    merged,
    on_grid,
    over_samples,
    runs_over_tokens,
    sequences,
)

WAY_OUT = "prune after a later block, or register a rule with rs_compile.register_token_rule"
OUTPUT = Reason("an output of the model", Code.OUTPUTS)
OF_OUTPUT = (
    "call the model without that output (output_attentions=False, say), or prune after the last block that makes it"
)


@dataclass
class TokenAxis:
    """What the analysis found downstream of `start`.

    Args:
        start: the value whose tokens are followed.
        batch: the factor of samples.
        layouts: for each value that runs over tokens its layout (a tuple of layouts for a tuple value).
        transfers: for each op that was carried through, what it does; includes ops that end the axis.
        dense: ops (and the output) that need every token, and why.
        sources: side inputs that are gathered where they are, before a softmax over them (`passes.axes.normalised`).
        ends: residual sums at which every token comes back, and why; who reads them is `dense`.
        whole: what is computed from them, on every token.
    """

    start: Node
    batch: Batch
    layouts: dict[Node, Any] = field(default_factory=dict)
    transfers: dict[Node, Transfer] = field(default_factory=dict)
    dense: dict[Node, Reason] = field(default_factory=dict)
    sources: dict[Node, Layout] = field(default_factory=dict)
    ends: Mapping[Node, Needed] = field(default_factory=dict)
    whole: set[Node] = field(default_factory=set)

    def carries(self, node: Node) -> bool:
        """Whether who reads a value reads it without the tokens that left."""
        return node in self.layouts and node not in self.ends


class Needed(Refusal):
    """An op needs every token and later layers depend on it.

    Args:
        axis: as far as it was followed.
        consumer: the op.
    """

    def __init__(self, axis: TokenAxis, consumer: Node, more: str = "") -> None:
        # a sequence without a dimension for samples may hold several
        one = "call the model with one image, " if over_samples(axis.layouts[axis.start]) is None else ""
        reason = axis.dense[consumer]
        way_out = OF_OUTPUT if OUTPUT.text in reason.text else one + WAY_OUT
        super().__init__(f"{reason}, and later layers depend on it{more}", consumer, way_out, code=reason.code)
        self.axis, self.consumer = axis, consumer

    def at_once(self) -> Needed:
        """The same, where tokens cannot leave because they would have to come back at once."""
        return Needed(self.axis, self.consumer, "; no layer lies between")


def stream_layout(stream: Node, prefix: int = 0, suffix: int = 0) -> tuple[Layout, Batch]:
    """The layout of a residual stream, read off its shape: [B, N, C] or [N, B, C], or on a grid [B, H, W, C].

    B may be a multiple of the samples: windows or frames, each a sequence that keeps as many tokens as any other.
    A stream [N, C] of literal sizes is one sample: no dimension runs over samples, and index maps are [1, K].

    Raises:
        Refusal: the stream has no separate sample and token dimension.
    """
    shape = stream.meta["val"].shape
    if len(shape) == 2 and all(isinstance(size, int) for size in shape):
        return (_sequence(shape[0], prefix, suffix), merged((Free(expr(shape[1])),))), Batch(expr(1))
    owner = stream.graph.owning_module
    samples = (FIXED_BATCH.get(owner) or 0) if owner is not None else 0
    over = [d for d, size in enumerate(shape) if isinstance(size, torch.SymInt)]
    if not over and samples and shape[:1] == (samples,):
        over = [0]  # no rule lets entries of the first dimension meet, so they are samples, or as good as samples
    if free_unbacked_symbols(shape):
        raise Refusal(
            f"the residual stream is {[str(s) for s in shape]}: how many tokens there are depends on the data",
            stream,
            'where a mask among the inputs picks them and is always the same, optimize(..., constant_inputs=["mask"])',
            code=Code.DATA_DEPENDENT,
        )
    grid = len(shape) == 4 and over == [0]
    if not (grid or len(shape) == 3) or len(over) != 1 or over[0] == 2 or not _counts(shape[over[0]]):
        fixed = f", and the model's code fixes its {samples} samples" if samples else ""
        raise Refusal(
            f"the residual stream is {[str(s) for s in shape]}, not [batch, tokens, channels]{fixed}",
            stream,
            "tokens folded into the batch, or of several samples in one sequence cannot be pruned"
            + ("; with one sample a call they might" if samples > 1 else ""),
            code=Code.NOT_A_SEQUENCE,
        )
    batch = Batch(expr(shape[over[0]]))
    if grid:
        rows, columns = int(shape[1]), int(shape[2])
        whole = Tokens.of([Fixed(prefix), Prunable(rows * columns - prefix - suffix), Fixed(suffix)])
        return ((batch,), *on_grid(whole, rows, columns), merged((Free(expr(shape[3])),))), batch
    tokens, channels = _sequence(shape[1 - over[0]], prefix, suffix), merged((Free(expr(shape[2])),))
    return ((batch,), tokens, channels) if over[0] == 0 else (tokens, (batch,), channels), batch


def sequences_per_sample(stream: Node) -> int:
    """How many sequences of tokens, windows or frames folded into the batch, a residual stream has for each sample."""
    return next((n for size in stream.meta["val"].shape if not isinstance(size, int) and (n := sequences(size))), 1)


def _counts(size: int | torch.SymInt) -> bool:
    """Whether a size counts samples, or sequences that each sample has as many of."""
    return isinstance(size, int) or sequences(size) is not None


def _sequence(count: int, prefix: int, suffix: int) -> Dim:
    """The dimension of so many tokens, of which some at either end always stay."""
    return merged((Tokens.of([Fixed(prefix), Prunable(int(count) - prefix - suffix), Fixed(suffix)]),))


def analyse(
    gm: GraphModule,
    start: Node,
    layout: Layout,
    batch: Batch,
    anchors: Collection[Node] = (),
    within: Collection[Node] | None = None,
    ends: Mapping[Node, Needed] | None = None,
    beside: Mapping[Node, Layout] | None = None,
) -> TokenAxis:
    """Follows the tokens of `start` through the graph.

    Args:
        gm: a captured graph with fake values in `node.meta["val"]`.
        start: the value to follow.
        layout: its layout.
        batch: the factor of samples in it.
        anchors: nodes of the network proper (sums of residual branches that are layers): one of them behind a
            consumer that needs every token means that the network depends on it, not only its end. Convolution
            branches of a dense head are none.
        within: follow only these nodes; an op that needs every token is then recorded, never refused.
        ends: see `TokenAxis`.
        beside: further values to follow, before `start`, that run over the same tokens, with their layouts.

    Raises:
        Needed: an op needs every token and later layers depend on it.
        Refusal: an op writes into what runs over tokens.
    """
    axis = TokenAxis(start, batch, {start: layout, **(beside or {})}, ends=ends or {})
    context = Context(axis.layouts, batch, axis.ends)
    behind: dict[Node, Node] = {}  # value -> the consumer of every token that it depends on
    memory: Memory | None = None
    writers: dict[Node, set[Node]] = {}  # ops that write in place -> who shares that memory
    node, left = start.next, None if within is None else len(set(within) - {start})
    while node.op != "root" and left != 0:
        if node.op != "output" and (within is None or node in within):
            _step(node, axis, context, behind, anchors, within is not None)
            if written := writes(node):
                memory = memory or Memory(gm.graph)
                writers[node] = {m for target in written for m in memory.members(target)}
                if node in behind:
                    behind |= dict.fromkeys(writers[node], behind[node])
                axis.whole |= writers[node] if node in axis.whole else set()
            left = None if left is None else left - 1
        elif node.op == "output" and any(n in axis.layouts for n in node.all_input_nodes):
            axis.dense[node] = OUTPUT
        node = node.next
    _refuse_writes(axis, writers)
    return axis


def _refuse_writes(axis: TokenAxis, writers: Mapping[Node, set[Node]]) -> None:
    """Refuses writes into memory of what gets a compact twin, or was gathered: both have memory of their own."""
    for node, touched in writers.items():
        gathered = {n for user, t in axis.transfers.items() if user < node for n in (*t.aligned, *t.beside)}
        if touched & (gathered | axis.layouts.keys()):
            raise _written(node)


def _written(node: Node) -> Refusal:
    return Refusal(
        "writes in place into a value that runs over tokens", node, "write the op out of place", code=Code.IN_PLACE
    )


def follow(
    gm: GraphModule,
    start: Node,
    layout: Layout,
    batch: Batch,
    anchors: Collection[Node] = (),
    streams: Collection[Node] | None = None,
    beside: Mapping[Node, Layout] | None = None,
) -> TokenAxis:
    """`analyse`, and where an op in the middle of the network needs every token, they are back in the last residual
    sum before it: what lies behind that sum reads the whole sequence.

    Args:
        anchors: see `analyse`; the sums where tokens may come back.
        streams: sums of this residual stream. What is read at full length must come from one of them without a mixing
            of tokens in between (a decoder's), or that needs every token as well. None: outputs are left short.
        beside: see `analyse`.

    Raises:
        Refusal: there is no sum between the start and the op.
    """
    ends: dict[Node, Needed] = {}
    while True:
        try:
            axis = analyse(gm, start, layout, batch, anchors, ends=ends, beside=beside)
            needed = None if streams is None else _mixed(axis, streams, beside or {})
        except Needed as found:
            needed = found
        if needed is None:
            return axis
        last = _last_sum(needed.axis, needed.consumer, anchors if streams is None else {*anchors} & {*streams})
        if last is None or last in ends:
            raise needed.at_once()
        ends[last] = needed


def _mixed(axis: TokenAxis, streams: Collection[Node], beside: Collection[Node]) -> Needed | None:
    """The mixing op that lies between the stream and who reads its result at full length, if there is one."""
    layout, seen = axis.layouts[axis.start], {axis.start, *axis.sources, *beside}
    for consumer, reason in list(axis.dense.items()):
        todo = [n for n in consumer.all_input_nodes if n in axis.layouts]
        while todo:
            value = todo.pop()
            if value in seen or (value in streams and axis.layouts[value] == layout):
                continue
            seen.add(value)
            if axis.transfers[value].mixes:
                text = f"its result is read at full length ({reason}), but it comes from an op that mixes tokens"
                axis.dense[value] = Reason(text, Code.EVERY_TOKEN)
                return Needed(axis, value)
            todo += [n for n in value.all_input_nodes if n in axis.layouts]
    return None


def _last_sum(axis: TokenAxis, consumer: Node, anchors: Collection[Node]) -> Node | None:
    """The last of the stream's residual sums that a consumer depends on through values without the tokens that left."""
    layout, seen, todo = axis.layouts[axis.start], {axis.start}, [consumer]
    last: Node | None = None
    while todo:
        for n in todo.pop().all_input_nodes:
            if n in seen or not axis.carries(n):
                continue
            seen.add(n)
            todo.append(n)
            if n in anchors and axis.layouts[n] == layout and (last is None or last < n):
                last = n
    return last


def _step(
    node: Node,
    axis: TokenAxis,
    context: Context,
    behind: dict[Node, Node],
    anchors: Collection[Node],
    alone: bool,
) -> None:
    inputs = node.all_input_nodes
    source = next((behind[n] for n in inputs if n in behind), None)
    carries = any(axis.carries(n) for n in inputs)
    if source is not None and not alone and (carries or node in anchors):
        raise Needed(axis, source)
    if source is not None:
        behind[node] = source
        if alone:
            return
    back = any(n in axis.layouts and n in axis.ends for n in inputs)
    if back or any(n in axis.whole for n in inputs):
        axis.whole.add(node)
        if carries:
            behind[node] = node
        if carries or back:
            text = "reads every token" if carries else "reads tokens where they are back"
            axis.dense[node] = Reason(text, Code.EVERY_TOKEN)
        return
    if not carries:
        return
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        raise _written(node)
    try:
        transfer = transfer_of(node, context)
        while (side := _normalised(transfer, axis)) is not None:
            if side.source < axis.start:
                raise Untransferable(
                    "meets weights that were normalised over tokens before some of them leave", code=Code.EVERY_TOKEN
                )
            if over_samples(side.layout) is None and axis.batch.size != 1:
                raise Untransferable(
                    "meets weights, normalised over tokens, that are the same for all samples", code=Code.SAMPLES_MEET
                )
            axis.sources[side.source] = axis.layouts[side.source] = side.layout
            for link in side.chain:
                _step(link, axis, context, behind, anchors, alone)
            if side.chain[-1] not in axis.layouts:
                raise Untransferable(
                    "meets weights that were normalised over tokens, and cannot be again", code=Code.EVERY_TOKEN
                )
            transfer = transfer_of(node, context)
        if any(normalised(n, target, axis.layouts.__contains__) for n, target in transfer.beside.items()):
            raise Untransferable(
                "multiplies with weights that were normalised over tokens, and cannot be again", code=Code.EVERY_TOKEN
            )
    except Untransferable as reason:
        axis.dense[node] = Reason(reason.text, reason.code)
        behind[node] = node
        return
    axis.transfers[node] = transfer
    out: Any = transfer.out
    if out is not None and (isinstance(node.meta["val"], (tuple, list)) or runs_over_tokens(out)):
        axis.layouts[node] = out


def _normalised(transfer: Transfer, axis: TokenAxis) -> Normalised | None:
    sides = (normalised(n, target, axis.layouts.__contains__) for n, target in transfer.aligned.items())
    return next((side for side in sides if side is not None), None)


def mixing(axis: TokenAxis, nodes: Mapping[Node, Any] | Collection[Node]) -> Node | None:
    """The first op among `nodes` in which a token's result depends on other tokens."""
    return next((n for n in axis.transfers if n in nodes and axis.transfers[n].mixes), None)
