"""What is to happen in which block, and the pass that does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from passes.axes.token_axis import stream_layout
from passes.graph.base import CompileError, Refusal
from passes.graph.codes import Code
from passes.network.branches import Block, tokens_of
from passes.network.padding import masking
from passes.network.protected import Protected
from passes.sites.importance import Score, Shift
from passes.sites.insert import InsertSelection
from passes.sites.insert_merge import InsertMerge
from passes.sites.insert_ward import InsertWard
from passes.sites.mergers import Merger, Stream, Ward
from passes.sites.retarget import Gap


@dataclass(frozen=True)
class Prune:
    """After which block how many tokens stay, and by which score.

    Args:
        block: 0-based.
        kept: from the number of tokens, protected ones included, how many stay.
        protected: positions that stay besides those found; None to find them only.
        force: insert even where every token stays (a test's switch).
    """

    block: int
    kept: Callable[[int], int]
    score: Score = Shift()
    protected: tuple[int, ...] | None = None
    force: bool = False


@dataclass(frozen=True)
class Merge:
    """In which block how many tokens merge into others.

    Args:
        block: 0-based.
        gone: from the number of tokens, protected ones included, how many merge away.
        by: which merge, where, and what becomes of them.
        protected: positions that neither merge nor are merged into, besides those found.
    """

    block: int
    gone: Callable[[int], int]
    by: Merger = Stream()
    protected: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Behind:
    """What happens behind the sites, and to the attention.

    Args:
        explicit: write out every attention as softmax(Q K^T) V, as published baselines run.
        gap: what scans do where tokens are gone, see `RetargetTokens`.
        drop_unread: nothing is computed for tokens that nobody reads behind the last attention.
    """

    explicit: bool = False
    gap: Gap = "compact"
    drop_unread: bool = False


def hidden_padding(gm: GraphModule, block: Block, guard: Protected) -> bool | Refusal:
    """Whether a mask of the inputs hides tokens as padding; why that cannot be told, which matters where some leave."""
    try:
        return masking(gm, block, guard.prefix, guard.suffix) is not None
    except Refusal as refusal:
        return refusal


def pass_for(
    gm: GraphModule, p: Prune | Merge, block: Block, guard: Protected, padded: bool | Refusal
) -> InsertSelection | InsertMerge | InsertWard | None:
    """The pass that does a step, or None where there is nothing to do."""
    length = tokens_of(place_of(p, block))
    if length is None:
        stream_layout(block.output)  # refuses, and says why
    assert length is not None
    if isinstance(p, Prune):
        keep = p.kept(length)
        if keep < guard.count:
            raise CompileError(
                f"after block {p.block} {keep} of {length} tokens would be left, "
                f"fewer than the {guard.count} protected ones; keep a larger share",
                code=Code.TOO_MANY,
            )
        if keep == length and not p.force:
            return None
        if isinstance(padded, Refusal):
            raise padded
        return InsertSelection(block, keep, guard, p.score, padded=padded)
    gone, able = p.gone(length), p.by.most(length, guard)
    if gone > able:
        raise CompileError(
            f"block {p.block} is to merge {gone} of {length} tokens away, and at most {able} can: "
            f"{p.by.limit}; merge fewer there and the rest in later blocks",
            code=Code.TOO_MANY,
        )
    if gone and isinstance(padded, Refusal):
        raise padded
    if gone and padded:
        raise Refusal(
            "a mask of the inputs may hide tokens as padding, and padding must not merge into a real token",
            block.attention_op() or block.output,
            "prune: Schedule(keep=...) lets padding leave first; or call the model without its mask",
            code=Code.PADDING,
        )
    if not gone:
        return None
    if isinstance(p.by, Ward):
        return InsertWard(block, gone, guard, by=p.by)
    return InsertMerge(block, gone, guard, p.by)


def place_of(p: Prune | Merge, block: Block) -> Node:
    """The stream value that tokens leave."""
    return p.by.point(block) if isinstance(p, Merge) else block.output
