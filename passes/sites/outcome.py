"""What became of the blocks: tokens, MACs and kernels before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from passes.attention.attention_kernel import KernelChoice, kernels
from passes.axes.token_axis import sequences_per_sample
from passes.graph.base import Skip
from passes.graph.cost import Cost
from passes.graph.splice import stand_ins
from passes.network.branches import Block, Branch, blocks_of, find_branches, tokens_of
from passes.network.stages import StageReport
from passes.sites.renaming import Renaming


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
    unread: int = 0  # FLOPs that `DropUnread` saved


@dataclass(frozen=True)
class Before:
    """The blocks of a graph before its sites: how many tokens each has, or None, and its MACs."""

    blocks: Sequence[Block]
    dense: Cost
    tokens: Mapping[int, int | None]

    @classmethod
    def of(cls, blocks: Sequence[Block], dense: Cost) -> Before:
        return cls(blocks, dense, {b.index: tokens_of(b.entry) for b in blocks})

    def report(self, gm: GraphModule, cost: Cost, names: Renaming, entries: Mapping[Node, Node]) -> list[BlockReport]:
        """A row a block.

        Args:
            gm: the rewritten graph.
            cost: of it.
            names: what became of the nodes.
            entries: of blocks that tokens merge in front of the attention of, before they do.
        """
        choice, rows = dict(kernels(gm)), []
        for b in self.blocks:
            nodes = {m for n in b.nodes for m in stand_ins(gm, names.current(n))}
            op, counted = b.attention_op(), self.tokens[b.index]
            rows.append(
                BlockReport(
                    b,
                    b.where,
                    counted and tokens_of(entries.get(b.entry) or names.whole(b.entry)),
                    counted and tokens_of(entries.get(b.output) or names.whole(b.output)),
                    self.dense.between(b.nodes).macs,
                    cost.between(nodes).macs,
                    _kernel(gm, names.current(op), choice) if op is not None else None,
                    sequences_per_sample(b.output),
                )
            )
        return rows


def block_kernels(gm: GraphModule) -> tuple[list[Block], list[Branch], dict[int, KernelChoice]]:
    """The blocks and branches of a graph, and by block the kernel that its attention takes."""
    branches, choice = find_branches(gm), dict(kernels(gm))
    blocks = blocks_of(branches)
    ops = {b.index: op for b in blocks if (op := b.attention_op()) is not None}
    return blocks, branches, {i: choice[op] for i, op in ops.items() if op in choice}


def _kernel(gm: GraphModule, op: Node, choice: Mapping[Node, KernelChoice]) -> KernelChoice | None:
    """The kernel of an attention op, whatever stands in its place."""
    stands = stand_ins(gm, op)
    explicit = KernelChoice("written out", "its map is read, or asked for") if len(stands) > 1 else None
    return next((choice[n] for n in stands if n in choice), explicit)
