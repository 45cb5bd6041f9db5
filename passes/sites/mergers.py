"""How tokens merge: which, where in a block, and what becomes of them behind it."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, field
from typing import ClassVar, get_args

from torch.fx import Node

from passes.graph.base import Refusal, ScheduleError
from passes.graph.codes import Code
from passes.network.branches import Block, Branch
from passes.sites.choice import check_choice, check_flag
from passes.sites.importance import AttentionEntropy, Score
from passes.sites.site import Restore


@dataclass(frozen=True)
class Merger(ABC):
    """What all mergers have.

    Args:
        size_bias: attention behind a merge adds the log of how many tokens a key stands for.
        weighted_mean: a mean over tokens behind a merge weighs them by size.
        restore: what a merged token gets back where every token is needed (dense outputs, a decoder): "change", its own
            value where it merged plus what its destination changed by since; "copy", its destination's value, as
            published mergers do.

    Raises:
        ScheduleError: an unknown word, with those that there are.
    """

    kind: ClassVar[str]  # its name in JSON and in tables
    size_bias: bool = field(default=True, kw_only=True)
    weighted_mean: bool = field(default=False, kw_only=True)
    restore: Restore = field(default="change", kw_only=True)

    def __post_init__(self) -> None:
        check_choice("restore", self.restore, get_args(Restore))
        check_flag("size_bias", self.size_bias)
        check_flag("weighted_mean", self.weighted_mean)

    def point(self, block: Block) -> Node:
        """The stream value that tokens merge in.

        Raises:
            Refusal: the block has no such place.
        """
        return block.output


def _attention(kind: str, where: str, block: Block) -> Branch:
    """The attention of a block whose MLP follows it."""
    if block.attention is None or block.attention.add is block.mlp.add:
        raise Refusal(
            f"{kind} merges {where}, and block {block.index} has no such place",
            block.output,
            "use Schedule(by=Stream()), which merges after the complete block",
            code=Code.NO_MERGE,
        )
    return block.attention


@dataclass(frozen=True)
class Stream(Merger):
    """Merges after the complete block, by the residual stream."""

    kind: ClassVar[str] = "stream"


@dataclass(frozen=True)
class ToMe(Merger):
    """Merges between attention and MLP, by the keys of the block's attention (Bolya et al., 2023)."""

    kind: ClassVar[str] = "tome"

    def point(self, block: Block) -> Node:
        return _attention(self.kind, "between attention and MLP", block).add


@dataclass(frozen=True)
class VidTLDR(Merger):
    """Merges between attention and MLP, by the stream, weighted by importance (Choi et al., 2024).

    Args:
        importance: what weighs the tokens: vid-TLDR's own entropy of attention, or another score; after the complete
            block with a score that is known there only, as the MLP's shift is.
    """

    kind: ClassVar[str] = "vid-tldr"
    importance: Score = AttentionEntropy()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.importance, Score) or self.importance.lowest:
            raise ScheduleError(f"importance is {self.importance!r}; write a score that is not Lowest, like Shift()")

    def point(self, block: Block) -> Node:
        if self.importance.known_after == "mlp":
            return block.output
        return _attention(self.kind, "between attention and MLP", block).add


@dataclass(frozen=True)
class Ward(Merger):
    """Merges at the inputs of attention: queries, keys, values and the stream around them together.

    It merges where that adds least to the variance of keys and values (Ward, 1963), times the root of the shift (MLP,
    L2) that the block before gave the tokens.
    """

    kind: ClassVar[str] = "ward"

    def point(self, block: Block) -> Node:
        return _attention(self.kind, "at the inputs of attention, in front of the MLP", block).stream


MERGERS: dict[str, type[Merger]] = {c.kind: c for c in (Stream, ToMe, VidTLDR, Ward)}
