"""Analysis: whether tokens can leave after a block, which must stay, and where they would come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from passes.axes.token_axis import follow, stream_layout
from passes.graph.base import CompileError, Refusal
from passes.graph.codes import Code
from passes.graph.facts import Fact
from passes.graph.layout import sequence_in, tokens_in
from passes.network.branches import Block, Branch
from passes.network.padding import masking
from passes.network.protected import Protected, find_protected, with_picked
from passes.network.same_stream import same_stream

# of graphs: protected tokens by block and given ones, shared by all copies of one capture
# of graphs: protected tokens by block and given ones, shared by all copies of one capture
GUARDS: Fact[dict[tuple[int, tuple[int, ...] | None], Protected]] = Fact("guards")


def guarded_once(gm: GraphModule, block: Block, given: tuple[int, ...] | None) -> Protected:
    """`protected_tokens` of a graph that nothing has left yet, found once for all copies of its capture."""
    known = GUARDS.first(gm, {})
    key = (block.index, given)
    if key not in known:
        known[key] = protected_tokens(gm, block, given)
    return known[key]


def protected_tokens(gm: GraphModule, block: Block, given: tuple[int, ...] | None) -> Protected:
    """The tokens that must stay: those found, and those given."""
    layout, _ = stream_layout(block.output)
    dims = [d for d, ts in enumerate(layout) if tokens_in(ts)] or [1]
    try:
        found = find_protected(gm, block.output, *dims)
    except Refusal:
        if given is None:
            raise
        found = Protected(0, 0)
    if len(dims) == 1:
        found = with_picked(gm, block.output, found)
    if not given:
        return found
    tokens = sequence_in(layout)
    length = tokens.dense if tokens is not None else 0
    if max(given) >= length:
        raise CompileError(
            f"protected token {max(given)} does not exist: there are {length} tokens, 0 to {length - 1}",
            code=Code.NO_SUCH_PART,
        )
    stay = [i < found.prefix or i >= length - found.suffix or i in found.extra or i in given for i in range(length)]
    # the prefix stays what the model's own slices know; given tokens may move
    extra = tuple(i for i, s in enumerate(stay) if s and found.prefix <= i < length - found.suffix)
    return Protected(found.prefix, found.suffix, extra)


@dataclass(frozen=True)
class Answer:
    """Whether tokens could leave after a block.

    Args:
        able: whether.
        reason: why not, "" where they can.
        until: the sums at which every token comes back for the layers behind; none where that is the network's end.
    """

    able: bool
    reason: str = ""
    until: tuple[Node, ...] = ()


def prunable(gm: GraphModule, block: Block, branches: Sequence[Branch]) -> Answer:
    """Whether tokens could leave after this block, or the reason why not. Changes nothing."""
    try:
        guard = guarded_once(gm, block, None)
        layout, batch = stream_layout(block.output, guard.prefix, guard.suffix)
        tokens = sequence_in(layout)
        if tokens is None or not tokens.prunable:
            raise Refusal(
                "none of its tokens is made from the input, so all of them are protected",
                block.output,
                "prune a stream of patches, frames or words; learned queries that read it have to stay",
                code=Code.NOT_A_SEQUENCE,
            )
        masking(gm, block, guard.prefix, guard.suffix)
        layers = [b.add for b in branches if b.whole]
        axis = follow(gm, block.output, layout, batch, layers, same_stream(branches, block.output))
    except Refusal as refusal:
        return Answer(False, str(refusal).replace("\n", "; "))
    return Answer(True, until=tuple(n for n in axis.ends if n in axis.layouts))
