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
from passes.graph.ops import shape_of
from passes.graph.splice import splice
from passes.network.branches import Block
from passes.sites import score
from passes.sites.choice import check_choice, check_flag
from passes.sites.explicit_attention import write_out


class Score(ABC):
    """How important each token is; tokens of the highest score stay."""

    kind: ClassVar[str]  # its name in JSON and in tables
    lowest: ClassVar[bool] = False  # whether the tokens of the lowest score stay

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
    """Of state-space models: the mean over channels of max(0, y) of the gated mixer output y (ToP-ViM)."""

    kind: ClassVar[str] = "top-vim"

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
        return splice(gm.graph, "score", lambda y: score.mean_activation(tokens_first(y, layout)), gated)


class _OfAttention(Score):
    """A score that reads the attention map of the block, which is then written out."""

    @abstractmethod
    def of_map(self, attention: Tensor) -> Tensor:
        """Scores [B, N] of a map [B, H, N, N]."""

    def insert(
        self, gm: GraphModule, block: Block, at: Node, layout: Layout, prefix: int, guard: Node | None = None
    ) -> Node:
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
        self.check(block, prefix)
        _check_every_token(block, block.output, layout, block.attention.term if block.attention else op)
        return splice(gm.graph, "score", self.of_map, write_out(gm, op))

    @property
    def known_after(self) -> Literal["attention", "mlp"]:
        return "attention"

    def check(self, block: Block, prefix: int) -> None:
        """Refuses where there is no such score."""


@dataclass(frozen=True)
class ClassAttention(_OfAttention):
    """The attention of the class token to each token, heads averaged (paper, Eq. 2)."""

    kind: ClassVar[str] = "class-attention"

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
    c.kind: c for c in (Shift, ClassAttention, MeanAttention, AttentionEntropy, TopViM, Random, Lowest)
}


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
