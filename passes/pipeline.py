"""The order of the passes, top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from passes.attention.attention_kernel import AUTOCAST
from passes.attention.lower_attention import LowerAttention
from passes.capture.capture import FIRST_RUN, capture
from passes.cleanup.canonicalise import Canonicalise
from passes.cleanup.composites import WriteComposites
from passes.cleanup.inline_regions import InlineRegions
from passes.cleanup.relative_shift import WriteRelativeShifts
from passes.device.name_flash import NameFlash
from passes.device.pad_keys import PadKeys, with_matrix_units
from passes.graph.base import CompileError, PassResult, Refusal, Skip, finish
from passes.graph.codes import Code
from passes.graph.cost import count
from passes.graph.facts import Fact
from passes.graph.layout import LAYOUTS
from passes.graph.splice import REPLACED
from passes.graph.verify import no_stale_shapes
from passes.network.branches import Block, Branch, block_before, blocks_of, find_branches
from passes.network.no_block import no_block
from passes.network.prunable import GUARDS, guarded_once
from passes.network.same_stream import same_stream
from passes.sites.drop_unread import DropUnread
from passes.sites.explicit_attention import ExplicitAttention
from passes.sites.full_length import WriteFullLength
from passes.sites.insert import InsertSelection
from passes.sites.insert_ward import InsertWard
from passes.sites.outcome import Before, Compiled
from passes.sites.renaming import Renaming
from passes.sites.restore import AppendKept, RestoreTokens
from passes.sites.retarget import RetargetTokens
from passes.sites.site import SITE, Site
from passes.sites.sizes import HOW, ApplySizes
from passes.sites.steps import Behind, Merge, Prune, hidden_padding, pass_for, place_of

# of graphs: by block the kept positions of the selections that its sequence went through
SELECTIONS: Fact[Mapping[int, tuple[Node, ...]]] = Fact("selections")


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
    gm = capture(model, args, kwargs, constant)
    FIRST_RUN.forget(gm)
    with torch._C._DisableAutocast():
        return cleaned(gm, lower, ambient_autocast, say)


def cleaned(
    gm: GraphModule,
    lower: bool,
    ambient_autocast: Mapping[str, torch.dtype] | None = None,
    say: Progress = lambda _: None,
) -> PassResult:
    """The clean-up of a captured graph alone; see `prepare`."""
    AUTOCAST.put(gm, dict(ambient_autocast or {}))
    say("rewriting the graph")
    skips: list[Skip] = []
    passes = [
        InlineRegions(ambient_autocast=bool(ambient_autocast)),
        WriteComposites(),  # before the others, which know ATen's ops
        WriteRelativeShifts(),  # first: what is written into its result is then no view
        Canonicalise(),  # before the matcher, which should not see dropouts and casts that do nothing
        *([LowerAttention()] if lower else []),
    ]
    for pass_ in passes:
        result = pass_.apply(gm)
        gm, skips = result.gm, skips + list(result.skips)
    finish(gm)
    GUARDS.put(gm, {})
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
    before = Before.of(blocks, count(gm))
    guarded = {p.block: guarded_once(gm, blocks[p.block], p.protected) for p in steps}
    # asked before the first site: behind it every mask, a constant too, is gathered by what the inputs hold
    padded = {i: hidden_padding(gm, blocks[i], guard) for i, guard in guarded.items()}
    layers = [b.add for b in branches if b.whole]
    own = {p.block: same_stream(branches, blocks[p.block].output) for p in steps}
    lead = {p.block: block_before(blocks, blocks[p.block]) for p in steps}
    places = {p.block: place_of(p, blocks[p.block]) for p in steps}
    names = Renaming([b.add for b in branches])
    sites: dict[int, Site] = {}  # by block
    entries: dict[Node, Node] = {}  # of blocks that tokens merge in front of the attention of, before they do
    selections: dict[int, tuple[Node, ...]] = {}
    taken: dict[Node, int] = {}  # by the sum after which a block's tokens left
    for p in sorted(steps, key=lambda p: p.block):
        block, at = names.of(blocks[p.block]), places[p.block]
        step = pass_for(gm, p, block, guarded[p.block], padded[p.block])
        if step is None:
            continue
        if at in names.needed:
            raise names.needed[at].at_once()
        # not by the start of the residual sums: a norm behind each sum starts new ones
        last = next((i for i in reversed(sites) if sites[i].carries(place_of(p, block))), None)
        if isinstance(step, InsertWard):
            entries[blocks[p.block].entry] = block.entry
            if (b := lead[p.block]) is not None:
                since = sites.get(b.index) if places.get(b.index) is b.output else None
                step = replace(step, before=names.of(b), since=since)
        elif at in taken:
            raise Refusal(
                f"blocks {taken[at]} and {p.block} are parallel branches of one sum, after which tokens leave once",
                at,
                f"schedule one of them: block {taken[at]} with the product of both keep ratios",
                code=Code.TOO_MANY,
            )
        else:
            taken[at] = p.block
        earlier = () if last is None else selections[last]
        step = replace(step, earlier=earlier, sizes=None if last is None else sites[last].sizes)
        if isinstance(step, InsertSelection) and last is not None:  # of tokens that a site before merged
            step = replace(step, size_bias=sites[last].size_bias, weighted_mean=sites[last].weighted_mean)
        result = step.apply(gm)
        mine = [names.current(s) for s in own[p.block]]
        anchors = [names.current(s) for s in layers]
        gm = RetargetTokens(anchors, None if compact_outputs else mine, behind.gap).apply(result.gm).gm
        gm = RestoreTokens(mine, compact_outputs).apply(gm).gm
        site = SITE.take(gm)
        LAYOUTS.forget(gm)
        sites[p.block] = site
        selections[p.block] = (*earlier, site.index)
        names.follow(site)
    if compact_outputs:
        gm = AppendKept().apply(gm).gm
    gm = WriteFullLength().apply(gm).gm
    gm = ApplySizes().apply(gm).gm
    if behind.explicit:
        gm = ExplicitAttention().apply(gm).gm
    skips: tuple[Skip, ...] = ()
    unread = 0
    if behind.drop_unread:  # behind all sites: only then is every consumer of a token there
        before_drop, dropped = count(gm).flops, DropUnread().apply(gm)
        gm, skips, unread = dropped.gm, dropped.skips, before_drop - count(dropped.gm).flops
    if sites:  # with nothing to prune the result is bit-equal to the model's, whatever SDPA chooses
        named = NameFlash().apply(gm)
        gm, skips = PadKeys(with_matrix_units()).apply(named.gm).gm, skips + named.skips
    finish(gm, no_stale_shapes)
    SELECTIONS.put(gm, selections)
    cost = count(gm)
    rows = before.report(gm, cost, names, entries)
    REPLACED.forget(gm)  # or it would keep the ops that are gone
    return Compiled(gm, tuple(rows), before.dense, cost, skips + cost.uncounted, (), (HOW.get(gm) or ""), unread)


def check_blocks(gm: GraphModule, blocks: list[Block], branches: list[Branch], wanted: Sequence[int]) -> None:
    """Refuses a schedule of blocks that are not there."""
    if wanted and not blocks:
        raise no_block(gm, branches)
    for i in wanted:
        if i >= len(blocks):
            raise CompileError(
                f"the schedule names block {i}, but the model has {len(blocks)} blocks, 0 to {len(blocks) - 1}; "
                "rs_compile.explain(model, inputs) lists them",
                code=Code.NO_SUCH_PART,
            )
