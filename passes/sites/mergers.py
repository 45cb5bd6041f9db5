"""How tokens merge: which, where in a block, and what becomes of them behind it."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.fx import Node

from passes.graph.base import Refusal, ScheduleError
from passes.graph.codes import Code
from passes.network.branches import Block, Branch
from passes.network.protected import Protected
from passes.sites.attention_scores import AttentionEntropy, ClassAttention
from passes.sites.choice import check_choice, check_flag
from passes.sites.importance import Score
from passes.sites.matching import Matched, Order, cosine, grown, match, merge, most, saliency
from passes.sites.per_block import PerBlock
from passes.sites.ranked import Energy, by_energy, by_rank
from passes.sites.site import Restore

SpareIn = Literal["every block", "second half", "first half", "no block"]


@dataclass(frozen=True)
class Merging:
    """Where tokens merge, and how many.

    Args:
        block: in which.
        r: how many tokens leave, `dropped` of them without merging.
        prefix, suffix: protected tokens at either end.
        free: how many tokens are not protected.
    """

    block: Block
    r: int
    dropped: int
    prefix: int
    suffix: int
    free: int


Merged = tuple[Tensor, Tensor, Matched]  # the stream [B, N - r, C], sizes [B, N - r] and who went where


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
    compares: ClassVar[str]  # what tells which tokens are alike, in words
    reads_keys: ClassVar[bool] = False  # of the block's attention
    limit: ClassVar[str] = "one of two, protected ones never"  # of what can leave in one block
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

    def most(self, count: int, guard: Protected) -> int:
        """How many of `count` tokens can leave in one block."""
        return most(count, guard.prefix, guard.suffix, len(guard.extra))

    @property
    def scored_by(self) -> Score | None:
        """What weighs or ranks the tokens, if anything does."""
        return None

    @property
    def drops(self) -> Mapping[int, int]:
        """By block how many of the tokens that leave there do so without merging."""
        return {}

    def order(self, prefix: int) -> Order:
        """The order of the tokens left, see `match`."""
        return "even-odd"

    def merged(
        self, x: Tensor, keys: Tensor | None, scores: Tensor | None, sizes: Tensor, guard: Tensor, at: Merging
    ) -> Merged:
        """Merges tokens, traced into the graph.

        Args:
            x: the stream, [B, N, C].
            keys: [B, H, N, d], where `reads_keys`.
            scores: [B, N], by `scored_by`.
            sizes: [B, N] float32.
            guard: which tokens are protected, [N] or [B, N] bool.
        """
        features = x if keys is None else keys.mean(1)
        matched = match(cosine(features), guard, at.r, at.prefix, at.suffix, self.order(at.prefix))
        (short,), sizes = merge([x], sizes, matched, None if scores is None else saliency(scores, guard))
        return short, sizes, matched


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
    compares: ClassVar[str] = "the residual stream behind the block"

    def order(self, prefix: int) -> Order:
        return "sequence"


@dataclass(frozen=True)
class ToMe(Merger):
    """Merges between attention and MLP, by the keys of the block's attention (Bolya et al., 2023)."""

    kind: ClassVar[str] = "tome"
    compares: ClassVar[str] = "the keys of the block's attention (ToMe)"
    reads_keys: ClassVar[bool] = True

    def point(self, block: Block) -> Node:
        return _attention(self.kind, "between attention and MLP", block).add

    def order(self, prefix: int) -> Order:
        return "strength" if prefix == 0 else "even-odd"


@dataclass(frozen=True)
class PiToMe(Merger):
    """Merges between attention and MLP, by the keys, those tokens that much of the image is like (Tran et al., 2024).

    A token's energy is the mean over all tokens of f(cosine of their keys), with f(x) = exp(x - m) - 1 below the
    margin m. Of the 2 r tokens of the highest energy every second one merges into the most similar of the others.
    The defaults are the paper's. Its published code has energy="code", margin=0.75, size_bias=False, and spares in the
    second half of the blocks or in the first, by model.

    Args:
        margin: m in the first block; it falls linearly and would be 0 behind the last.
        energy: f above the margin: "paper", x itself; "code", x - m.
        spare_in: in which blocks tokens of low energy are spared. In the others all tokens take part, every second by
            energy, and the r strongest edges merge.
    """

    kind: ClassVar[str] = "pitome"
    compares: ClassVar[str] = "keys, where much of the image is alike (PiToMe)"
    reads_keys: ClassVar[bool] = True
    margin: float = 0.9
    energy: Energy = "paper"
    spare_in: SpareIn = "every block"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.margin, bool) or not isinstance(self.margin, Real) or not -1 <= self.margin <= 1:
            raise ScheduleError(f"margin is {self.margin!r}; write a cosine, from -1 to 1, like 0.9")
        check_choice("energy", self.energy, get_args(Energy))
        check_choice("spare_in", self.spare_in, get_args(SpareIn))

    def point(self, block: Block) -> Node:
        return _attention(self.kind, "between attention and MLP", block).add

    def margin_in(self, block: Block) -> float:
        """m in this block."""
        return self.margin * (1 - block.index / block.depth)

    def spares(self, block: Block) -> bool:
        """Whether tokens of low energy are spared in this block."""
        early = block.index < (block.depth + 1) // 2
        return {"every block": True, "first half": early, "second half": not early, "no block": False}[self.spare_in]

    def merged(
        self, x: Tensor, keys: Tensor | None, scores: Tensor | None, sizes: Tensor, guard: Tensor, at: Merging
    ) -> Merged:
        assert keys is not None
        margin, spare = self.margin_in(at.block), self.spares(at.block)
        matched = by_energy(keys.mean(1), guard, at.r, at.prefix, at.free, margin, self.energy, spare)
        (short,), sizes = merge([x], sizes, matched)
        return short, sizes, matched


@dataclass(frozen=True)
class _ByImportance(Merger):
    """Merges between attention and MLP; after the complete block by a score that is known there only."""

    importance: Score = AttentionEntropy()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.importance, Score) or self.importance.lowest:
            raise ScheduleError(f"importance is {self.importance!r}; write a score that is not Lowest, like Shift()")

    @property
    def scored_by(self) -> Score:
        return self.importance

    def point(self, block: Block) -> Node:
        if self.importance.known_after == "mlp":
            return block.output
        return _attention(self.kind, "between attention and MLP", block).add


@dataclass(frozen=True)
class VidTLDR(_ByImportance):
    """Merges between attention and MLP, by the stream, weighted by importance (Choi et al., 2024).

    Args:
        importance: what weighs the tokens: vid-TLDR's own entropy of attention, or another score; after the complete
            block with a score that is known there only, as the MLP's shift is.
    """

    kind: ClassVar[str] = "vid-tldr"
    compares: ClassVar[str] = "the stream, weighed by importance (vid-TLDR)"


@dataclass(frozen=True)
class DiffRate(_ByImportance):
    """Prunes and merges between attention and MLP: of the tokens of low importance the lowest are dropped, the others
    merge into the most similar one of those that stay, by the stream, into plain means (Chen et al., 2023).

    A source adds its size times that cosine, at least 0, to its destination's. Tokens stay in the order of importance.

    Args:
        importance: what ranks the tokens: DiffRate's own class attention, with size bias, or another score.
        pruned: block index -> how many of the tokens that leave there are dropped; in other blocks all merge.
    """

    kind: ClassVar[str] = "diffrate"
    compares: ClassVar[str] = "the stream, ranked by importance (DiffRate)"
    limit: ClassVar[str] = "all but one, protected ones never"
    importance: Score = ClassAttention(size_bias=True)
    pruned: Mapping[int, int] = PerBlock()

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = list(self.pruned.items()) if isinstance(self.pruned, Mapping) else [(-1, -1)]
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for pair in pairs for n in pair):
            raise ScheduleError(
                f"pruned is {self.pruned!r}; write how many of a block's tokens are dropped, like {{2: 4, 3: 8}}"
            )
        object.__setattr__(self, "pruned", PerBlock(pairs))

    def most(self, count: int, guard: Protected) -> int:
        return max(0, count - guard.count - 1)

    @property
    def drops(self) -> Mapping[int, int]:
        return self.pruned

    def merged(
        self, x: Tensor, keys: Tensor | None, scores: Tensor | None, sizes: Tensor, guard: Tensor, at: Merging
    ) -> Merged:
        assert scores is not None
        matched, near = by_rank(x, scores, guard, at.r - at.dropped, at.dropped, at.prefix, at.free)
        share = sizes.gather(1, matched.sources) * near.clamp_min(0)
        (short,), _ = merge([x], torch.ones_like(sizes), matched)
        _, sizes = grown(sizes, share, None, matched)
        return short, sizes, matched


@dataclass(frozen=True)
class Ward(Merger):
    """Merges at the inputs of attention: queries, keys, values and the stream around them together.

    It merges where that adds least to the variance of keys and values (Ward, 1963), times the root of the shift (MLP,
    L2) that the block before gave the tokens.
    """

    kind: ClassVar[str] = "ward"
    compares: ClassVar[str] = "what adds least to the variance of keys and values (Ward)"

    def point(self, block: Block) -> Node:
        return _attention(self.kind, "at the inputs of attention, in front of the MLP", block).stream


MERGERS: dict[str, type[Merger]] = {c.kind: c for c in (Stream, ToMe, PiToMe, VidTLDR, DiffRate, Ward)}
