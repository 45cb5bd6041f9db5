"""One table: for every op that may meet a token axis, what it does to it. An op without a rule refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from passes.graph.base import CompileError, op_name
from passes.graph.codes import Code
from passes.graph.layout import Batch, Dim, Layout, Part, Tokens, plain, tokens_in
from passes.graph.ops import checked_operator, shape_of


class Untransferable(CompileError):
    """A rule declines: the op is not proven to mean the same on a shorter sequence. Holds the reason."""

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
    """What an op does to the token axis.

    Args:
        out: the result's layout, a tuple of them for a tuple result, None where the result does not run
            over tokens any more.
        aligned: inputs that pair up with tokens by position and are gathered first, with the layout that
            they broadcast to (right-aligned, as broadcasting does).
        target: the op to emit, where it is another.
        args: its arguments, where they differ; `Extent` and `Position` become sizes.
        kwargs: its keyword arguments, likewise.
        beside: inputs that pair up with tokens and are read with an entry for each, with the same.
        mixes: a token's result depends on other tokens.
        ordered: and on the order that they come in (a scan, a convolution, causal attention).
        decay: the arguments to emit instead where the schedule says gap="decay", for an op that can carry
            its state over the gap that pruned tokens leave; may hold `Kept`.
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


class Context:
    """What a rule may ask about an op's inputs."""

    def __init__(self, layouts: Mapping[Node, Any], batch: Batch, ends: Container[Node] = ()) -> None:
        self._layouts = layouts
        self._ends = ends  # read with every token
        self.batch = batch

    def layout(self, node: Any) -> Layout | None:
        """The layout of an input that runs over tokens, else None."""
        return self._layouts.get(node) if isinstance(node, Node) and node not in self._ends else None

    def sides(self, node: Any) -> Layout:
        """The layout of any tensor input: its own, or one read off its shape."""
        own = self.layout(node)
        return own if own is not None else tuple(self.plain(s) for s in shape_of(node))

    def plain(self, size: Any) -> Dim:
        return plain(size, self.batch)


Rule: TypeAlias = Callable[[Node, Context], Transfer]
TOKEN_RULES: dict[Any, Rule] = {}


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


def rule_for(target: Any) -> Rule | None:
    """The rule of an op: its own, its class's, its packet's, or the pointwise rule where torch tags it so."""
    if target in TOKEN_RULES or type(target) in TOKEN_RULES:
        return TOKEN_RULES.get(target) or TOKEN_RULES[type(target)]
    if isinstance(target, torch._ops.OpOverload):
        if target.overloadpacket in TOKEN_RULES:
            return TOKEN_RULES[target.overloadpacket]
        if torch.Tag.pointwise in target.tags and not target._schema.is_mutable:
            return TOKEN_RULES["pointwise"]
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


def rules_for(*ops: Any) -> Callable[[Rule], Rule]:
    """Decorator: one rule for several ops."""

    def add(rule: Rule) -> Rule:
        for op in ops:
            TOKEN_RULES[op] = rule
        return rule

    return add


def need_whole(dim: Dim, doing: str) -> None:
    """Declines where a dimension runs over rows or columns of tokens alone."""
    if isinstance(tokens_in(dim), Part):
        raise Untransferable(f"{doing} rows or columns of the tokens' grid alone", code=Code.EVERY_TOKEN)


def need_free(layout: Layout, dims: Any, doing: str) -> None:
    """Declines where one of the dimensions runs over tokens or samples."""
    for d in dims:
        if tokens_in(layout[d]) is not None:
            raise Untransferable(f"{doing} runs over the token axis", code=Code.EVERY_TOKEN)
        if any(isinstance(f, Batch) for f in layout[d]):
            raise Untransferable(f"{doing} runs over the samples of the batch", code=Code.SAMPLES_MEET)
