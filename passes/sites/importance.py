"""What tokens are scored by: representation shift, and baselines that read no attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from torch import Tensor
from torch.fx import GraphModule, Node

from passes.axes.gather import tokens_first
from passes.graph.base import Refusal, ScheduleError
from passes.graph.codes import Code
from passes.graph.layout import Layout, tokens_in
from passes.graph.ops import shape_of
from passes.graph.splice import splice
from passes.network.branches import Block
from passes.network.directions import backward_term
from passes.sites import score
from passes.sites.choice import check_choice, check_flag

TopViMForm = Literal["paper", "code"]


@dataclass(frozen=True)
class Selecting:
    """What is selected by a score, for scores that depend on it.

    Args:
        guard: which tokens are protected, [N] or [B, N] bool.
        leave: how many of the others leave.
        marks: the score itself is to mark the protected ones, see `score.shift`.
    """

    guard: Node
    leave: int
    marks: bool


@dataclass(frozen=True)
class Scored:
    """Whose tokens are scored, and where.

    Args:
        gm: the graph; the score's ops go to its insertion point.
        block: whose branches are read.
        stream: whose tokens are scored.
        layout: of the stream.
        prefix: tokens that always stay in front.
        select: what is selected by the scores; None where they are only looked at, or weigh tokens.
    """

    gm: GraphModule
    block: Block
    stream: Node
    layout: Layout
    prefix: int
    select: Selecting | None = None


class Score(ABC):
    """How important each token is; tokens of the highest score stay."""

    kind: ClassVar[str]  # its name in JSON and in tables
    lowest: ClassVar[bool] = False  # whether the tokens of the lowest score stay
    can_mark: ClassVar[bool] = False  # whether it can mark protected tokens in the same kernel

    @property
    def centres(self) -> bool:
        """Whether the one protected token is put in the middle of those that stay."""
        return False

    @property
    def known_after(self) -> Literal["attention", "mlp"]:
        """Behind which branch of a block it can be computed."""
        return "mlp"

    @abstractmethod
    def insert(self, at: Scored) -> Node:
        """Scores [B, N] in float32, at the graph's insertion point.

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
    can_mark: ClassVar[bool] = True
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

    def insert(self, at: Scored) -> Node:
        after, before = self._between(at.block)
        check_every_token(at.block, at.stream, at.layout, after, before)
        skip = self.with_skip and self.of != "block"

        def shift(a: Tensor, b: Tensor, protected: Tensor | None) -> Tensor:
            a = a + b if skip else a  # not the block's sum: beside a parallel branch that holds more
            return score.shift(tokens_first(a, at.layout), tokens_first(b, at.layout), self.metric, protected)

        return splice(
            at.gm.graph, "score", shift, after, before, at.select.guard if at.select and at.select.marks else None
        )

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

    def insert(self, at: Scored) -> Node:
        return splice(at.gm.graph, "score", lambda x: score.random_score(tokens_first(x, at.layout)), at.stream)


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

    def insert(self, at: Scored) -> Node:
        gated = at.block.gated()
        if gated is None:
            raise Refusal(
                f"block {at.block.index} has no mixer that ends in a linear layer, whose input ToP-ViM scores",
                at.block.output,
                "use Schedule(score=Shift()), which any block has",
                code=Code.NO_SCORE,
            )
        if self.form == "paper":
            return splice(at.gm.graph, "score", lambda y: score.mean_activation(tokens_first(y, at.layout)), gated)
        backward = backward_term(at.block)
        if backward is None:
            raise Refusal(
                f"block {at.block.index} does not end in the sum of a scan forward and one backward, which is told by "
                "a flip or an argument `reverse`",
                at.block.output,
                "use Schedule(score=TopViM()), which scores both together",
                code=Code.NO_SCORE,
            )
        return splice(at.gm.graph, "score", lambda y: score.flipped_activation(tokens_first(y, at.layout)), backward)


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

    def insert(self, at: Scored) -> Node:
        return self.score.insert(replace(at, select=None))


def check_every_token(block: Block, stream: Node, layout: Layout, *read: Node) -> None:
    """Refuses where a score reads what ran without tokens that are back in the stream."""
    over = [d - len(layout) for d, dim in enumerate(layout) if tokens_in(dim)]
    if any(shape_of(n)[d] != shape_of(stream)[d] for n in read for d in over):
        raise Refusal(
            f"tokens that left before block {block.index} come back inside of it, and not all have a score",
            stream,
            'use Schedule(score=Shift(of="mlp")), or prune after another block',
            code=Code.NO_SCORE,
        )
