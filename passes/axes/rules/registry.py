"""Two tables: for every op that may meet tokens, or rows and columns of a map, what it does to them.

An op without a rule refuses. Where an op leaves what gets shorter alone, one rule stands in both tables.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch.fx import Node

from passes.graph.base import CompileError, op_name
from passes.graph.codes import Code
from passes.graph.layout import Batch, Dim, Layout, Part, Tokens, followed, plain, resized, tokens_in
from passes.graph.ops import checked_operator, shape_of


class Untransferable(CompileError):
    """A rule declines: the op is not proven to mean the same on fewer tokens, rows or columns. Holds the reason."""

    family = Code.NO_RULE


@dataclass(frozen=True)
class Extent:
    """Stands in a rewritten argument for the size of a dimension."""

    dim: Dim


@dataclass(frozen=True)
class Position:
    """Stands in a rewritten argument for a border between stretches of a sequence, counted from its start."""

    tokens: Tokens
    at: int


@dataclass(frozen=True)
class Kept:
    """Stands in `Transfer.decay` for the positions, among the tokens of a dimension, that are left: [B, K] int64."""

    dim: Dim


@dataclass(frozen=True)
class Transfer:
    """What an op does to tokens, or to rows and columns.

    Args:
        out: the result's layout, a tuple of them for a tuple result, None where the result does not run
            over tokens (rows, columns) any more.
        aligned: inputs that pair up with tokens (cells) by position and are gathered first, with the layout that
            they broadcast to (right-aligned, as broadcasting does).
        target: the op to emit, where it is another.
        args: its arguments, where they differ; `Extent` and `Position` become sizes.
        kwargs: its keyword arguments, likewise.
        beside: inputs that pair up with tokens and are read with an entry for each, with the same.
        mixes: a token's result depends on other tokens.
        ordered: and on the order that they come in (a scan, a convolution, causal attention).
        decay: the arguments to emit instead where the schedule says gap="decay", for an op that can carry
            its state over the gap that pruned tokens leave; may hold `Kept`.
        period: of maps: the arguments are right where rows and columns shrink by multiples of these.
        fixed: of maps: the result is a grid of a fixed size instead.
        apart: its inputs may be maps of different sizes.
    """

    out: Layout | tuple[Layout | None, ...] | None
    aligned: Mapping[Node, Layout] = field(default_factory=dict)
    target: Callable[..., Any] | None = None
    args: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] | None = None
    beside: Mapping[Node, Layout] = field(default_factory=dict)
    mixes: bool = False
    ordered: bool = False
    decay: tuple[Any, ...] | None = None
    period: tuple[int, int] = (1, 1)
    fixed: bool = False
    apart: bool = False


class Context:
    """What a rule may ask about an op's inputs."""

    side: ClassVar = "only a side input of it carries tokens"
    unknown: ClassVar = "no rule says what this op does to a shorter sequence of tokens"

    def __init__(self, layouts: Mapping[Node, Any], batch: Batch, ends: Container[Node] = ()) -> None:
        self._layouts = layouts
        self._ends = ends  # read with every token
        self.batch = batch

    @property
    def rules(self) -> Mapping[Any, Rule]:
        """The table for what is followed."""
        return TOKEN_RULES

    def layout(self, node: Any) -> Layout | None:
        """The layout of an input that runs over tokens (rows, columns), else None."""
        return self._layouts.get(node) if isinstance(node, Node) and node not in self._ends else None

    def carried(self, node: Node) -> Layout:
        """The layout of an op's first input, which must be one that runs over tokens (rows, columns)."""
        layout = self.layout(node.args[0])
        if layout is None:
            raise Untransferable(self.side, code=Code.OTHER_SEQUENCE)
        return layout

    def sides(self, node: Any) -> Layout:
        """The layout of any tensor input: its own, or one read off its shape."""
        own = self.layout(node)
        return own if own is not None else tuple(self.plain(s) for s in shape_of(node))

    def plain(self, size: Any) -> Dim:
        return plain(size, self.batch)

    def resized(self, dim: Dim, size: Any, doing: str) -> Dim:
        """A dimension of which an op picks or joins entries; declines where it runs over samples that keep tokens."""
        out = resized(dim, size, self.batch)
        if out is None:
            raise Untransferable(f"{doing} samples of the batch", code=Code.SAMPLES_MEET)
        return out


class MapContext(Context):
    """The same where rows and columns of a map are followed.

    Args:
        layouts, batch: see `Context`.
        cut: of the map that is cut its samples, rows and columns; None where maps are followed and none is cut.
        fixed: values made from the map pooled to a grid of a fixed size.
    """

    side = "the rows and columns do not come in by its first input alone"
    unknown = "no rule says what this op does on a smaller grid of rows and columns"

    def __init__(
        self,
        layouts: Mapping[Node, Any],
        batch: Batch,
        cut: tuple[Dim, Dim, Dim] | None = None,
        fixed: Container[Node] = (),
    ) -> None:
        super().__init__(layouts, batch)
        self.cut, self.fixed = cut, fixed

    @property
    def rules(self) -> Mapping[Any, Rule]:
        return GRID_RULES

    def carried(self, node: Node) -> Layout:
        layout = super().carried(node)
        if sum(n in self._layouts for n in node.all_input_nodes) != 1:
            raise Untransferable(self.side, code=Code.OTHER_SEQUENCE)
        return layout


Rule: TypeAlias = Callable[[Node, Context], Transfer]
TOKEN_RULES: dict[Any, Rule] = {}
GRID_RULES: dict[Any, Rule] = {}


def register_token_rule(op: Any, rule: Rule) -> None:
    """Says what an op does to the token axis, for custom ops and for ops that have no rule yet.

    Args:
        op: one overload (`torch.ops.mine.scan.default`), all of an op (`torch.ops.mine.scan`), or what
            `torch.library.custom_op` returned.
        rule: takes the fx node and a `Context`, returns a `Transfer`, or raises `Untransferable(reason)`.

    Raises:
        TypeError: `op` is no op.
    """
    TOKEN_RULES[checked_operator(op)] = rule


def register_grid_rule(op: Any, rule: Rule) -> None:
    """Says what an op does to the rows and columns of a map, for custom ops and for ops that have no rule yet.

    Args:
        op: see `register_token_rule`.
        rule: likewise; the layouts that it reads and returns have `Line` factors.

    Raises:
        TypeError: `op` is no op.
    """
    GRID_RULES[checked_operator(op)] = rule


def rule_for(target: Any, rules: Mapping[Any, Rule] = TOKEN_RULES) -> Rule | None:
    """The rule of an op: its own, its class's, its packet's, or the pointwise rule where torch tags it so."""
    if target in rules or type(target) in rules:
        return rules.get(target) or rules[type(target)]
    if isinstance(target, torch._ops.OpOverload):
        if target.overloadpacket in rules:
            return rules[target.overloadpacket]
        if torch.Tag.pointwise in target.tags and not target._schema.is_mutable:
            return rules["pointwise"]
    return None


@contextmanager
def rule_faults(node: Node) -> Iterator[None]:
    """What a rule raises and did not mean to: a warning that names the op, which then counts as one without a rule."""
    try:
        yield
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        text = f"its rule failed on this form of {op_name(node)} ({type(error).__name__}: {error})"
        warnings.warn(f"rs_compile: {op_name(node)}: {text}; please report this", RuntimeWarning, stacklevel=1)
        raise Untransferable(text, code=Code.NO_RULE) from error


def rules_for(*ops: Any, maps: bool = False) -> Callable[[Rule], Rule]:
    """Decorator: one rule for several ops, to which tokens may come, or with `maps` rows and columns as well."""
    return _into([TOKEN_RULES, GRID_RULES] if maps else [TOKEN_RULES], ops)


def grid_rules_for(*ops: Any) -> Callable[[Rule], Rule]:
    """Decorator: one rule for several ops to which rows and columns may come."""
    return _into([GRID_RULES], ops)


def _into(tables: Sequence[dict[Any, Rule]], ops: Sequence[Any]) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        for table in tables:
            table.update(dict.fromkeys(ops, rule))
        return rule

    return add


def need_whole(dim: Dim, doing: str) -> None:
    """Declines where a dimension runs over rows or columns of tokens alone."""
    if isinstance(tokens_in(dim), Part):
        raise Untransferable(f"{doing} rows or columns of the tokens' grid alone", code=Code.EVERY_TOKEN)


def need_free(layout: Sequence[Dim], dims: Any, doing: str) -> None:
    """Declines where one of the dimensions runs over tokens, rows, columns or samples."""
    for d in dims:
        over = followed(layout[d])
        if over is not None:
            raise Untransferable(f"{doing} runs over {over.named.axis}", code=over.named.code)
        if any(isinstance(f, Batch) for f in layout[d]):
            raise Untransferable(f"{doing} runs over the samples of the batch", code=Code.SAMPLES_MEET)
