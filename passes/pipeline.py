"""The order of the passes, top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from passes.attention.attention_kernel import AUTOCAST, KernelChoice, kernels
from passes.attention.lower_attention import LowerAttention
from passes.axes.token_axis import Needed, sequences_per_sample, stream_layout
from passes.capture.capture import capture
from passes.cleanup.canonicalise import Canonicalise
from passes.cleanup.inline_regions import InlineRegions
from passes.cleanup.relative_shift import WriteRelativeShifts
from passes.device.name_flash import NameFlash
from passes.device.pad_keys import PadKeys, with_matrix_units
from passes.graph.base import CompileError, PassResult, Refusal, Skip, finish
from passes.graph.cost import Cost, count
from passes.graph.layout import sequence_in
from passes.graph.splice import REPLACED, stand_ins
from passes.graph.verify import no_stale_shapes, not_put_back
from passes.network.branches import Block, Branch, block_before, blocks_of, find_branches
from passes.network.no_block import no_block
from passes.network.padding import masking
from passes.network.protected import Protected
from passes.network.prunable import protected_tokens
from passes.network.same_stream import same_stream
from passes.network.stages import StageReport
from passes.sites.explicit_attention import ExplicitAttention
from passes.sites.full_length import WriteFullLength
from passes.sites.importance import Scoring
from passes.sites.insert import InsertSelection
from passes.sites.insert_merge import InsertMerge, Merger, merge_point
from passes.sites.insert_ward import InsertWard
from passes.sites.matching import most
from passes.sites.restore import AppendKept, RestoreTokens
from passes.sites.retarget import Gap, RetargetTokens
from passes.sites.site import SITE, Restore, Site
from passes.sites.sizes import HOW, ApplySizes

SELECTIONS = "selections"  # gm.meta key: by block the kept positions of the selections that its sequence went through


@dataclass(frozen=True)
class Prune:
    """After which block how many tokens stay, and how they are chosen.

    Args:
        block: 0-based.
        kept: from the number of tokens, protected ones included, how many stay.
        protected: positions that stay besides those found; None to find them only.
        force: insert even where every token stays (a test's switch).
    """

    block: int
    kept: Callable[[int], int]
    scoring: Scoring = Scoring()
    lowest: bool = False
    protected: tuple[int, ...] | None = None
    force: bool = False


@dataclass(frozen=True)
class Merge:
    """In which block how many tokens merge into others.

    Args:
        block: 0-based.
        gone: from the number of tokens, protected ones included, how many merge away.
        merger, scoring: see `InsertMerge`.
        protected: positions that neither merge nor are merged into, besides those found.
        restore: what merged tokens get back, see `Site`.
    """

    block: int
    gone: Callable[[int], int]
    merger: Merger = "stream"
    scoring: Scoring = Scoring()
    protected: tuple[int, ...] | None = None
    restore: Restore = "change"


@dataclass(frozen=True)
class Behind:
    """What happens behind the sites, and to the attention.

    Args:
        size_bias: attention adds the log of how many tokens a key stands for.
        weighted_mean: a mean over tokens weighs them by that number.
        explicit: write out every attention as softmax(Q K^T) V, as published baselines run.
        gap: what scans do where tokens are gone, see `RetargetTokens`.
    """

    size_bias: bool = True
    weighted_mean: bool = False
    explicit: bool = False
    gap: Gap = "compact"


@dataclass(frozen=True)
class BlockReport:
    """What became of a block: tokens in and out, MACs, attention kernel, sequences of so many tokens a sample."""

    block: Block
    where: str
    tokens_in: int | None
    tokens_out: int | None
    macs_dense: int
    macs: int
    kernel: KernelChoice | None
    sequences: int = 1


@dataclass(frozen=True)
class Compiled:
    """A rewritten graph and what is to be said about it."""

    gm: GraphModule
    blocks: tuple[BlockReport, ...]
    dense: Cost
    cost: Cost
    skips: tuple[Skip, ...]
    stages: tuple[StageReport, ...] = ()
    size_bias: str = ""  # how it reaches attention: "mask", "channel"


Progress = Callable[[str], None]


def prepare(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    lower: bool,
    ambient_autocast: Mapping[str, torch.dtype] | None = None,
    say: Progress = lambda _: None,
    constant: Collection[int] = (),
) -> PassResult:
    """Capture and clean-up: what every model goes through, pruned or not.

    Args:
        model, args, kwargs: see `capture`.
        lower: whether hand-written attention becomes scaled_dot_product_attention.
        ambient_autocast: the autocast that the graph will run under, its dtype by device type; regions that
            switch it off must then stay.
        say: called with a line of text at each stage.
        constant: see `capture`.
    """
    say("capturing the model")
    return cleaned(capture(model, args, kwargs, constant), lower, ambient_autocast, say)


def cleaned(
    gm: GraphModule,
    lower: bool,
    ambient_autocast: Mapping[str, torch.dtype] | None = None,
    say: Progress = lambda _: None,
) -> PassResult:
    """The clean-up of a captured graph alone; see `prepare`."""
    gm.meta[AUTOCAST] = dict(ambient_autocast or {})
    say("rewriting the graph")
    skips: list[Skip] = []
    passes = [
        InlineRegions(ambient_autocast=bool(ambient_autocast)),
        WriteRelativeShifts(),  # first: what is written into its result is then no view
        Canonicalise(),  # before the matcher, which should not see dropouts and casts that do nothing
        *([LowerAttention()] if lower else []),
    ]
    for pass_ in passes:
        result = pass_.apply(gm)
        gm, skips = result.gm, skips + list(result.skips)
    finish(gm)
    return PassResult(gm, skips=tuple(skips))


def prune(
    gm: GraphModule, steps: Sequence[Prune | Merge], compact_outputs: bool = False, behind: Behind = Behind()
) -> Compiled:
    """Inserts selections and merges one after another; each works on the graph that the one before it left.

    Raises:
        Refusal: a rewrite cannot be proven right.
    """
    branches = find_branches(gm)
    blocks = blocks_of(branches)
    check_blocks(gm, blocks, branches, [p.block for p in steps])
    dense = count(gm)
    spans = {b.index: _nodes(b) for b in blocks}
    before = {i: dense.between(nodes).macs for i, nodes in spans.items()}
    lengths = {b.index: _tokens(b.entry) for b in blocks}
    guarded = {p.block: protected_tokens(gm, blocks[p.block], p.protected) for p in steps}
    # asked before the first site: behind it every mask, a constant too, is gathered by what the inputs hold
    padded = {i for i, guard in guarded.items() if masking(gm, blocks[i], guard.prefix, guard.suffix) is not None}
    streams, layers = [b.add for b in branches], [b.add for b in branches if b.whole]
    own = {p.block: same_stream(branches, blocks[p.block].output) for p in steps}
    lead = {p.block: block_before(blocks, blocks[p.block]) for p in steps}
    places = {p.block: _place(p, blocks[p.block]) for p in steps}
    now: dict[Node, Node] = {}
    back: dict[Node, Node] = {}  # residual sums at which tokens came back, with all of them
    why: dict[Node, Needed] = {}  # the same sums
    sites: dict[int, Site] = {}  # by block
    entries: dict[Node, Node] = {}  # of blocks that tokens merge in front of the attention of, before they do
    selections: dict[int, tuple[Node, ...]] = {}
    for p in sorted(steps, key=lambda p: p.block):
        block, at = _moved(blocks[p.block], now, back), places[p.block]
        step = _step(gm, p, block, guarded[p.block], p.block in padded)
        if step is None:
            continue
        if at in why:
            raise why[at].at_once()
        # not by the start of the residual sums: a norm behind each sum starts new ones
        last = next((i for i in reversed(sites) if sites[i].carries(_place(p, block))), None)
        if isinstance(step, InsertWard):
            entries[blocks[p.block].entry] = block.entry
            if (b := lead[p.block]) is not None:
                since = sites.get(b.index) if places.get(b.index) is b.output else None
                step = replace(step, before=_moved(b, now, back), since=since)
        earlier = () if last is None else selections[last]
        result = replace(
            step,
            earlier=earlier,
            sizes=None if last is None else sites[last].sizes,
            size_bias=behind.size_bias,
            weighted_mean=behind.weighted_mean,
        ).apply(gm)
        mine = [now.get(s, s) for s in own[p.block]]
        anchors = [now.get(s, s) for s in layers]
        gm = RetargetTokens(anchors, None if compact_outputs else mine, behind.gap).apply(result.gm).gm
        gm = RestoreTokens(mine, compact_outputs).apply(gm).gm
        site: Site = gm.meta.pop(SITE)
        not_put_back(gm, site.full)
        sites[p.block] = site
        selections[p.block] = (*earlier, site.index)
        ends = site.axis.ends if site.axis is not None else {}
        met = {n: now.get(n, n) for n in streams if now.get(n, n) in {*ends} & {*site.restored} and n not in back}
        back |= {n: site.restored[m] for n, m in met.items()}
        why |= {n: ends[m] for n, m in met.items()}
        moved = {site.stream: site.short, **site.compact}
        now = {n: moved.get(now.get(n, n), now.get(n, n)) for n in {*now, *moved}}
    if compact_outputs:
        gm = AppendKept().apply(gm).gm
    gm = WriteFullLength().apply(gm).gm
    gm = ApplySizes().apply(gm).gm
    if behind.explicit:
        gm = ExplicitAttention().apply(gm).gm
    skips: tuple[Skip, ...] = ()
    if sites:  # with nothing to prune the result is bit-equal to the model's, whatever SDPA chooses
        named = NameFlash().apply(gm)
        gm, skips = PadKeys(with_matrix_units()).apply(named.gm).gm, named.skips
    finish(gm)
    no_stale_shapes(gm)
    gm.meta[SELECTIONS] = selections
    cost = count(gm)
    choice = dict(kernels(gm))
    rows, whole = [], back | entries
    for b in blocks:
        nodes = {m for n in spans[b.index] for m in stand_ins(gm, now.get(n, n))}
        op = b.attention_op()
        rows.append(
            BlockReport(
                b,
                b.where,
                lengths[b.index] and _tokens(whole.get(b.entry) or now.get(b.entry, b.entry)),
                lengths[b.index] and _tokens(whole.get(b.output) or now.get(b.output, b.output)),
                before[b.index],
                cost.between(nodes).macs,
                _kernel(gm, now.get(op, op), choice) if op is not None else None,
                sequences_per_sample(b.output),
            )
        )
    gm.meta.pop(REPLACED, None)  # or it would keep the ops that are gone
    return Compiled(gm, tuple(rows), dense, cost, skips + cost.uncounted, size_bias=gm.meta.get(HOW, ""))


def check_blocks(gm: GraphModule, blocks: list[Block], branches: list[Branch], wanted: Sequence[int]) -> None:
    """Refuses a schedule of blocks that are not there."""
    if wanted and not blocks:
        raise no_block(gm, branches)
    for i in wanted:
        if i >= len(blocks):
            raise CompileError(
                f"the schedule names block {i}, but the model has {len(blocks)} blocks, 0 to {len(blocks) - 1}; "
                "rs_compile.explain(model, inputs) lists them"
            )


def block_kernels(gm: GraphModule) -> tuple[list[Block], list[Branch], dict[int, KernelChoice]]:
    """The blocks and branches of a graph, and by block the kernel that its attention takes."""
    branches, choice = find_branches(gm), dict(kernels(gm))
    blocks = blocks_of(branches)
    ops = {b.index: op for b in blocks if (op := b.attention_op()) is not None}
    return blocks, branches, {i: choice[op] for i, op in ops.items() if op in choice}


def _step(
    gm: GraphModule, p: Prune | Merge, block: Block, guard: Protected, padded: bool
) -> InsertSelection | InsertMerge | InsertWard | None:
    """The pass that does a step, or None where there is nothing to do."""
    length = _tokens(_place(p, block))
    if length is None:
        stream_layout(block.output)
        raise Refusal("the residual stream has no token dimension", block.output)
    if isinstance(p, Prune):
        keep = p.kept(length)
        if keep < guard.count:
            raise CompileError(
                f"after block {p.block} {keep} of {length} tokens would be left, "
                f"fewer than the {guard.count} protected ones; keep a larger share"
            )
        return (
            None
            if keep == length and not p.force
            else InsertSelection(block, keep, guard, p.scoring, p.lowest, padded=padded)
        )
    gone, able = p.gone(length), most(length, guard.prefix, guard.suffix, len(guard.extra))
    if gone > able:
        raise CompileError(
            f"block {p.block} is to merge {gone} of {length} tokens away, and at most {able} can: "
            "one of two, protected ones never; merge fewer there and the rest in later blocks"
        )
    if gone and padded:
        raise Refusal(
            "a mask of the inputs may hide tokens as padding, and padding must not merge into a real token",
            block.attention_op() or block.output,
            "prune: Schedule(keep=...) lets padding leave first; or call the model without its mask",
        )
    if not gone:
        return None
    if p.merger == "ward":
        return InsertWard(block, gone, guard, restore=p.restore)
    return InsertMerge(block, gone, guard, p.merger, p.scoring, p.restore)


def _place(p: Prune | Merge, block: Block) -> Node:
    """The stream value that tokens leave."""
    return merge_point(block, p.merger, p.scoring) if isinstance(p, Merge) else block.output


def _kernel(gm: GraphModule, op: Node, choice: Mapping[Node, KernelChoice]) -> KernelChoice | None:
    """The kernel of an attention op, whatever stands in its place."""
    stands = stand_ins(gm, op)
    explicit = KernelChoice("written out", "its map is read, or asked for") if len(stands) > 1 else None
    return next((choice[n] for n in stands if n in choice), explicit)


def _tokens(stream: Node) -> int | None:
    """Tokens of a residual stream, or None where it has no dimension of its own for them."""
    try:
        layout, _ = stream_layout(stream)
    except Refusal:
        return None
    tokens = sequence_in(layout)
    return tokens.dense if tokens is not None else None


def _nodes(block: Block) -> set[Node]:
    branches = [b for b in (block.attention, block.mlp) if b is not None]
    return {n for b in branches for n in b.nodes}


def _moved(block: Block, now: Mapping[Node, Node], back: Mapping[Node, Node]) -> Block:
    """The block's nodes as earlier selections left them, and as they came back."""

    def branch(b: Branch) -> Branch:
        return Branch(
            b.kind,
            back.get(b.stream) or now.get(b.stream, b.stream),
            now.get(b.term, b.term),
            back.get(b.add) or now.get(b.add, b.add),
            frozenset(now.get(n, n) for n in b.nodes),
            b.reason,
            b.at,
        )

    return Block(block.index, branch(block.mlp), branch(block.attention) if block.attention is not None else None)
