"""Scores of a block's attention map, which is then written out: baselines; representation shift needs none."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph.base import Refusal, ScheduleError
from passes.graph.codes import Code
from passes.graph.layout import Batch, Layout, expr
from passes.graph.ops import arguments
from passes.graph.splice import splice
from passes.network.branches import Block
from passes.sites import pagerank, score
from passes.sites.choice import check_choice, check_flag
from passes.sites.explicit_attention import write_out
from passes.sites.importance import Lowest, Random, Score, Scored, Shift, TopViM, check_every_token


class _OfAttention(Score):
    """A score that reads the attention map of the block, which is then written out."""

    @abstractmethod
    def of_map(self, attention: Tensor) -> Tensor:
        """Scores [B, N] of a map [B, H, N, N]."""

    def insert(self, at: Scored) -> Node:
        self.check(at.block, at.prefix)
        return splice(at.gm.graph, "score", self.of_map, attention_map(at.gm, at.block, at.layout, self.with_sizes)[0])

    @property
    def known_after(self) -> Literal["attention", "mlp"]:
        return "attention"

    @property
    def with_sizes(self) -> bool:
        """Whether merged tokens count in the map for what they stand for."""
        return False

    def check(self, block: Block, prefix: int) -> None:
        """Refuses where there is no such score."""


@dataclass(frozen=True)
class ClassAttention(_OfAttention):
    """The attention of the class token to each token, heads averaged (paper, Eq. 2).

    Args:
        size_bias: behind a merge, attention with the size bias, as the values are mixed by it (DiffRate's).
    """

    kind: ClassVar[str] = "class-attention"
    size_bias: bool = False

    def __post_init__(self) -> None:
        check_flag("size_bias", self.size_bias)

    @property
    def with_sizes(self) -> bool:
        return self.size_bias

    def of_map(self, attention: Tensor) -> Tensor:
        return score.class_attention(attention)

    def check(self, block: Block, prefix: int) -> None:
        if prefix == 0:
            raise Refusal(
                "class attention needs a class token in front",
                block.output,
                "use Schedule(score=MeanAttention()) or Shift()",
                code=Code.NO_SCORE,
            )


@dataclass(frozen=True)
class MeanAttention(_OfAttention):
    """The attention that each token receives, heads and queries averaged (paper, Eq. 3)."""

    kind: ClassVar[str] = "mean-attention"

    def of_map(self, attention: Tensor) -> Tensor:
        return score.mean_attention(attention)


@dataclass(frozen=True)
class AttentionEntropy(_OfAttention):
    """The negative entropy of each token's attention, heads averaged first (vid-TLDR's saliency)."""

    kind: ClassVar[str] = "attention-entropy"

    def of_map(self, attention: Tensor) -> Tensor:
        return score.attention_entropy(attention)


@dataclass(frozen=True)
class ZeroTPrune(Score):
    """Zero-TPrune (Wang et al., 2024): PageRank on the block's attention, and tokens like a better one go first.

    I' stage: importance by one round of votes. S stage: the less important half of the tokens is compared with the
    other by keys, and the most similar leave. I stage: PageRank among those left; the least important leave. Where
    the publication is silent: keys are averaged over heads, and votes for tokens that left are shared among the
    others. How many tokens leave where is the schedule's: the published counts are not known.

    Args:
        similar: the share of the leaving tokens that the S stage takes. Where another thing than pruning asks for
            the score (score maps, a merger's importance, `Lowest`) no token leaves, and it is the I stage alone.
        rounds: of votes in the I stage; None for 30 in the first three blocks, 1 in the last three, 5 between,
            which the publication's ranges (30 to 50, 1, 5 to 10) begin with.
        start: "class", the class token's vote weighs the root of the token count at first; "uniform" (Zero-TPrune-uni).
        head_filter: only heads whose scores vary neither too little nor too much take part. The published bounds, 0.01
            and 0.7, let no head pass where scores sum to 1 (of 197 tokens the variance is at most 0.005), and the scale
            that they are meant for is not stated; here scores have mean 1, and all heads take part where none passes.

    Raises:
        ScheduleError: a value out of its range.
    """

    kind: ClassVar[str] = "zero-tprune"
    similar: float = 0.5
    rounds: int | None = None
    start: pagerank.Start = "class"
    head_filter: bool = False

    def __post_init__(self) -> None:
        real = isinstance(self.similar, int | float) and not isinstance(self.similar, bool)
        if not (real and 0 <= self.similar <= 1):
            raise ScheduleError(f"similar is {self.similar!r}; write a share, from 0 to 1")
        rounds = self.rounds
        if rounds is not None and (not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1):
            raise ScheduleError(f"rounds is {rounds!r}; write an integer of at least 1, or None")
        check_choice("start", self.start, get_args(pagerank.Start))
        check_flag("head_filter", self.head_filter)

    @property
    def known_after(self) -> Literal["attention", "mlp"]:
        return "attention"

    def insert(self, at: Scored) -> Node:
        attention, keys = attention_map(at.gm, at.block, at.layout)
        start: pagerank.Start = self.start if at.prefix else "uniform"
        similar, rounds = int(self.similar * at.select.leave) if at.select else 0, self.rounds or _rounds(at.block)

        def scores(a: Tensor, k: Tensor, protected: Tensor | None) -> Tensor:
            return pagerank.zero_tprune(a, k, protected, similar, rounds, start, self.head_filter)

        return splice(at.gm.graph, "score", scores, attention, keys, at.select.guard if at.select else None)


def _rounds(block: Block) -> int:
    return 30 if block.index < 3 else 1 if block.index >= block.depth - 3 else 5


SCORES: dict[str, type[Score]] = {
    c.kind: c for c in (Shift, ClassAttention, MeanAttention, AttentionEntropy, ZeroTPrune, TopViM, Random, Lowest)
}


def attention_map(gm: GraphModule, block: Block, layout: Layout, size_bias: bool = False) -> tuple[Node, Node]:
    """The block's attention map [B, H, N, N], which is then written out, and its keys [B, H, N, d].

    Args:
        layout: of the stream that is scored.
        size_bias: see `write_out`.

    Raises:
        Refusal: the block has none for every token.
    """
    op = block.attention_op()
    if op is None or not by_sample(op, layout):
        raise Refusal(
            f"block {block.index} has no single attention op to take a map from"
            if op is None
            else f"the attention of block {block.index} is not on [batch, heads, tokens, channels]",
            block.output,
            "use Schedule(score=Shift()), which needs no attention map",
            code=Code.NO_SCORE,
        )
    check_every_token(block, block.output, layout, block.attention.term if block.attention else op)
    keys: Node = arguments(op)["key"]
    return write_out(gm, op, size_bias), keys


def by_sample(op: Node, layout: Layout) -> bool:
    """Whether an attention op runs over [batch, heads, tokens, channels], not over samples and heads folded into one.

    Args:
        layout: of the stream, which names the batch.
    """
    shape = op.meta["val"].shape
    batch = next((f.size for dim in layout for f in dim if isinstance(f, Batch)), 1)
    return len(shape) == 4 and bool(expr(shape[0]) == batch)
