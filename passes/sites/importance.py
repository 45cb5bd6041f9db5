"""What tokens are scored by: representation shift, and the baselines it is compared with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor
from torch.fx import GraphModule, Node

from passes.axes.gather import tokens_first
from passes.graph.base import Refusal, ScheduleError
from passes.graph.codes import Code
from passes.graph.layout import Batch, Layout, expr, tokens_in
from passes.graph.ops import arguments, shape_of
from passes.graph.splice import splice
from passes.network.branches import Block
from passes.network.directions import backward_term
from passes.sites import pagerank, score
from passes.sites.choice import check_choice, check_flag
from passes.sites.explicit_attention import write_out

TopViMForm = Literal["paper", "code"]


class Score(ABC):
    """How important each token is; tokens of the highest score stay."""

    kind: ClassVar[str]  # its name in JSON and in tables
    lowest: ClassVar[bool] = False  # whether the tokens of the lowest score stay

    @property
    def centres(self) -> bool:
        """Whether the one protected token is put in the middle of those that stay."""
        return False

    @property
    def known_after(self) -> Literal["attention", "mlp"]:
        """Behind which branch of a block it can be computed."""
        return "mlp"

    @abstractmethod
    def insert(
        self, gm: GraphModule, block: Block, at: Node, layout: Layout, prefix: int, guard: Node | None = None
    ) -> Node:
        """Scores [B, N] in float32, at the graph's insertion point.

        Args:
            at: the stream whose tokens are scored.
            layout: of that stream.
            prefix: tokens that always stay in front.
            guard: of `Shift`: tokens to mark as protected, see `score.shift`.

        Raises:
            Refusal: the block has no such branch, or its attention no map to read.
        """


@dataclass(frozen=True)
class Shift(Score):
    """Representation shift s = D(F(x), x) (paper, section 3 and Eq. 4).

    Args:
        of: the layer F: "mlp" and "attention" compare that branch's output with the stream that it is computed from
            and added to, "block" the block's output with its input, skips included. Where a sum weighs its stream,
            alpha * x + f(x), the stream is x, not scaled, unless f reads alpha * x.
        metric: D, the distance over the channels: "l2" unsquared, "l1", or "cosine", 1 - cos.
        with_skip: compare x + F(x), not F(x), with x; a block's shift has its skips in any case.

    Raises:
        ScheduleError: an unknown word, with those that there are.
    """

    kind: ClassVar[str] = "shift"
    of: score.Operation = "mlp"
    metric: score.Metric = "l2"
    with_skip: bool = False

    def __post_init__(self) -> None:
        check_choice("of", self.of, get_args(score.Operation))
        check_choice("metric", self.metric, get_args(score.Metric))
        check_flag("with_skip", self.with_skip)

    @property
    def known_after(self) -> Literal["attention", "mlp"]:
        return "attention" if self.of == "attention" else "mlp"

    def insert(
        self, gm: GraphModule, block: Block, at: Node, layout: Layout, prefix: int, guard: Node | None = None
    ) -> Node:
        after, before = self._between(block)
        _check_every_token(block, at, layout, after, before)
        skip = self.with_skip and self.of != "block"

        def shift(a: Tensor, b: Tensor, protected: Tensor | None) -> Tensor:
            a = a + b if skip else a  # not the block's sum: beside a parallel branch that holds more
            return score.shift(tokens_first(a, layout), tokens_first(b, layout), self.metric, protected)

        return splice(gm.graph, "score", shift, after, before, guard)

    def _between(self, block: Block) -> tuple[Node, Node]:
        """F(x) and x."""
        if self.of == "block":
            return block.output, block.entry
        branch = block.mlp if self.of == "mlp" else block.attention
        if branch is None:
            raise Refusal(
                f"block {block.index} has no attention branch to score by",
                block.output,
                'use Schedule(score=Shift(of="mlp"))',
                code=Code.NO_SCORE,
            )
        return branch.term, branch.stream


@dataclass(frozen=True)
class Random(Score):
    """A random number a token, of torch's own generator: what a score must beat."""

    kind: ClassVar[str] = "random"

    @property
    def known_after(self) -> Literal["attention", "mlp"]:
        return "attention"

    def insert(
        self, gm: GraphModule, block: Block, at: Node, layout: Layout, prefix: int, guard: Node | None = None
    ) -> Node:
        return splice(gm.graph, "score", lambda x: score.random_score(tokens_first(x, layout)), at)


@dataclass(frozen=True)
class TopViM(Score):
    """Of state-space models: a sum over the channels of the gated mixer output y (ToP-ViM; Zhan et al., 2024).

    Args:
        form: "paper", the mean of max(0, y) of both directions together. "code", as the published code runs: the sum of
            y itself, of the backward direction alone, in that direction's order, so that token i has the score of
            token N - 1 - i; and the class token is put back in the middle of the patches that stay. The code looks for
            the class token in the first sample of a batch only and may keep it twice in the others; here it is found
            in each.

    Raises:
        ScheduleError: another form.
    """

    kind: ClassVar[str] = "top-vim"
    form: TopViMForm = "paper"

    def __post_init__(self) -> None:
        check_choice("form", self.form, get_args(TopViMForm))

    @property
    def centres(self) -> bool:
        return self.form == "code"

    def insert(
        self, gm: GraphModule, block: Block, at: Node, layout: Layout, prefix: int, guard: Node | None = None
    ) -> Node:
        gated = block.gated()
        if gated is None:
            raise Refusal(
                f"block {block.index} has no mixer that ends in a linear layer, whose input ToP-ViM scores",
                block.output,
                "use Schedule(score=Shift()), which any block has",
                code=Code.NO_SCORE,
            )
        if self.form == "paper":
            return splice(gm.graph, "score", lambda y: score.mean_activation(tokens_first(y, layout)), gated)
        backward = backward_term(block)
        if backward is None:
            raise Refusal(
                f"block {block.index} does not end in the sum of a scan forward and one backward, which is told by a "
                "flip or an argument `reverse`",
                block.output,
                "use Schedule(score=TopViM()), which scores both together",
                code=Code.NO_SCORE,
            )
        return splice(gm.graph, "score", lambda y: score.flipped_activation(tokens_first(y, layout)), backward)


class _OfAttention(Score):
    """A score that reads the attention map of the block, which is then written out."""

    @abstractmethod
    def of_map(self, attention: Tensor) -> Tensor:
        """Scores [B, N] of a map [B, H, N, N]."""

    def insert(
        self, gm: GraphModule, block: Block, at: Node, layout: Layout, prefix: int, guard: Node | None = None
    ) -> Node:
        self.check(block, prefix)
        return splice(gm.graph, "score", self.of_map, attention_map(gm, block, layout, self.with_sizes)[0])

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

    def insert(
        self, gm: GraphModule, block: Block, at: Node, layout: Layout, prefix: int, guard: Node | None = None
    ) -> Node:
        return self.insert_among(gm, block, layout, prefix, None, 0)

    def insert_among(
        self, gm: GraphModule, block: Block, layout: Layout, prefix: int, guard: Node | None, leave: int
    ) -> Node:
        """Scores by which `leave` tokens are to leave, none of those that `guard` marks; see `Score.insert`."""
        attention, keys = attention_map(gm, block, layout)
        start: pagerank.Start = self.start if prefix else "uniform"
        similar, rounds = int(self.similar * leave), self.rounds or _rounds(block)

        def scores(a: Tensor, k: Tensor, protected: Tensor | None) -> Tensor:
            return pagerank.zero_tprune(a, k, protected, similar, rounds, start, self.head_filter)

        return splice(gm.graph, "score", scores, attention, keys, guard)


def _rounds(block: Block) -> int:
    return 30 if block.index < 3 else 1 if block.index >= block.depth - 3 else 5


@dataclass(frozen=True)
class Lowest(Score):
    """The tokens of the lowest score stay: a baseline that shows what the score is worth.

    Args:
        score: whose lowest.

    Raises:
        ScheduleError: it is no score, or another `Lowest`.
    """

    kind: ClassVar[str] = "lowest"
    lowest: ClassVar[bool] = True
    score: Score = Shift()

    def __post_init__(self) -> None:
        if not isinstance(self.score, Score) or self.score.lowest:
            raise ScheduleError(f"Lowest of {self.score!r}; write Lowest(Shift()), or another score in it")

    @property
    def known_after(self) -> Literal["attention", "mlp"]:
        return self.score.known_after

    def insert(
        self, gm: GraphModule, block: Block, at: Node, layout: Layout, prefix: int, guard: Node | None = None
    ) -> Node:
        return self.score.insert(gm, block, at, layout, prefix)


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
    _check_every_token(block, block.output, layout, block.attention.term if block.attention else op)
    keys: Node = arguments(op)["key"]
    return write_out(gm, op, size_bias), keys


def _check_every_token(block: Block, stream: Node, layout: Layout, *read: Node) -> None:
    """Refuses where a score reads what ran without tokens that are back in the stream."""
    over = [d - len(layout) for d, dim in enumerate(layout) if tokens_in(dim)]
    if any(shape_of(n)[d] != shape_of(stream)[d] for n in read for d in over):
        raise Refusal(
            f"tokens that left before block {block.index} come back inside of it, and not all have a score",
            stream,
            'use Schedule(score=Shift(of="mlp")), or prune after another block',
            code=Code.NO_SCORE,
        )


def by_sample(op: Node, layout: Layout) -> bool:
    """Whether an attention op runs over [batch, heads, tokens, channels], not over samples and heads folded into one.

    Args:
        layout: of the stream, which names the batch.
    """
    shape = op.meta["val"].shape
    batch = next((f.size for dim in layout for f in dim if isinstance(f, Batch)), 1)
    return len(shape) == 4 and bool(expr(shape[0]) == batch)
