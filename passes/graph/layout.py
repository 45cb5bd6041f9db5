"""Layouts: which dimension of a value runs over tokens, rows or columns of a map, samples, or none of these.

A layout gives for each dimension the factors that are folded into it, outermost first, as einops writes
`(batch tokens) channels`. A `view` regroups the factors; a factor of samples is never split, and one of tokens in two
at most, where all of them may go: rows and columns. Where tokens are gone the rows run over those left, and there is
one column. Where windows or frames are folded into the samples, each is a sequence, and the factor counts these.
Rows and columns of a map (`Line`) may be folded into one dimension, whole and in this order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any, ClassVar, NamedTuple, TypeAlias

import sympy
import torch
from torch.fx import Node

from passes.graph.codes import Code
from passes.graph.facts import Fact

Size: TypeAlias = sympy.Expr


LAYOUTS: Fact[Mapping[Node, Any]] = Fact("layouts")  # of graphs: of values with tokens that leave


def expr(size: int | torch.SymInt | Size) -> Size:
    """The size as an expression in the batch symbol."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)


def sequences(size: int | torch.SymInt | Size) -> int | None:
    """How many times the one symbol in it a size is, or None where it is no multiple of one symbol."""
    times, rest = expr(size).as_coeff_Mul()
    return int(times) if rest.is_Symbol and times.is_Integer else None


@dataclass(frozen=True)
class Fixed:
    """Consecutive positions that always stay where they are: prefix tokens, a class token that joins late."""

    length: int


@dataclass(frozen=True)
class Prunable:
    """The stretch of the sequence out of which tokens go."""

    length: int


Piece: TypeAlias = Fixed | Prunable


class Names(NamedTuple):
    """What refusals call a kind of factor that gets shorter: its entries, its axis, and two of it that do not match.

    Its code is of ops that need all of it.
    """

    many: str
    axis: str
    apart: str
    code: Code


@dataclass(frozen=True)
class Tokens:
    """A factor that runs over tokens.

    Args:
        pieces: the stretches it covers, in order.
        weights: it holds attention weights, which sum to one along it.
    """

    named: ClassVar = Names("tokens", "the token axis", "two different sequences of tokens meet", Code.EVERY_TOKEN)

    pieces: tuple[Piece, ...]
    weights: bool = False

    @classmethod
    def of(cls, pieces: Iterable[Piece], weights: bool = False) -> Tokens:
        """Drops empty pieces and joins neighbouring fixed ones, so that equal sequences compare equal."""
        joined: list[Piece] = []
        for piece in pieces:
            if piece.length == 0:
                continue
            if joined and isinstance(piece, Fixed) and isinstance(joined[-1], Fixed):
                joined[-1] = Fixed(joined[-1].length + piece.length)
            else:
                joined.append(piece)
        return cls(tuple(joined), weights)

    @property
    def dense(self) -> int:
        return sum(piece.length for piece in self.pieces)

    def compact(self, left: int) -> int:
        """Positions once `left` tokens remain of each prunable stretch."""
        return sum(piece.length if isinstance(piece, Fixed) else left for piece in self.pieces)

    @property
    def prunable(self) -> bool:
        return any(isinstance(piece, Prunable) for piece in self.pieces)

    def border(self, position: int) -> tuple[int, int] | None:
        """How many (fixed positions, prunable stretches) lie before `position`; None inside a stretch."""
        fixed = stretches = 0
        for piece in self.pieces:
            if position == 0:
                break
            if isinstance(piece, Prunable):
                if position < piece.length:
                    return None
                stretches += 1
                position -= piece.length
            else:
                step = min(position, piece.length)
                fixed += step
                position -= step
        return (fixed, stretches) if position == 0 else None

    def cut(self, start: int, stop: int) -> Tokens | None:
        """The stretch from start to stop, or None where that would cut into prunable tokens."""
        if self.border(start) is None or self.border(stop) is None:
            return None
        pieces: list[Piece] = []
        at = 0
        for piece in self.pieces:
            overlap = min(stop, at + piece.length) - max(start, at)
            if overlap > 0:
                pieces.append(Fixed(overlap) if isinstance(piece, Fixed) else piece)
            at += piece.length
        return Tokens.of(pieces, self.weights)

    def same_sequence(self, other: Tokens) -> bool:
        return replace(self, weights=False) == replace(other, weights=False)


@dataclass(frozen=True)
class Part(Tokens):
    """The rows or the columns of tokens that lie on a grid, in the order of the rows.

    Args:
        pieces: of the whole sequence.
        at: 0 for rows, 1 for columns.
        sizes: how many rows and columns; more than one of each.
    """

    at: int = 0
    sizes: tuple[int, int] = (1, 1)

    @property
    def dense(self) -> int:
        return self.sizes[self.at]

    def compact(self, left: int) -> int:
        return left if self.at == 0 else 1

    def border(self, position: int) -> tuple[int, int] | None:
        return None

    @property
    def whole(self) -> Tokens:
        return Tokens(self.pieces)


@dataclass(frozen=True)
class Batch:
    """The factor that runs over samples, or over the sequences (windows, frames) that each sample has as many of."""

    size: Size

    @property
    def sequences(self) -> int:
        """How many sequences a sample has; 1 where the number of samples is literal."""
        return sequences(self.size) or 1


@dataclass(frozen=True)
class Maps(Batch):
    """The factor that runs over samples of maps. A cut takes as much out of each, so ops may pick, join and split them.

    Args:
        parted: some of them only, or more of them, or in another order.
    """

    parted: bool = False


@dataclass(frozen=True)
class Line:
    """The rows or the columns of a map that is cut.

    Args:
        at: 0 for rows, 1 for columns.
        count: how many.
        step: rows (columns) of the cut map from one of these to the next.
        start: the row (column) of the cut map that the first of these is centred on.
    """

    named: ClassVar = Names(
        "rows or columns",
        "rows or columns",
        "two maps meet whose rows or columns do not belong together",
        Code.NEEDS_THE_MAP,
    )

    at: int
    count: int
    step: int = 1
    start: Fraction = Fraction(0)


@dataclass(frozen=True)
class Free:
    """Any other factor: heads, channels, frames."""

    size: Size


Factor: TypeAlias = Tokens | Line | Batch | Free
Dim: TypeAlias = tuple[Factor, ...]
Layout: TypeAlias = tuple[Dim, ...]


def factor_size(factor: Factor) -> Size:
    if isinstance(factor, Tokens | Line):
        return sympy.Integer(factor.dense if isinstance(factor, Tokens) else factor.count)
    return factor.size


def dim_size(dim: Dim) -> Size:
    return sympy.prod([factor_size(f) for f in dim]) if dim else sympy.Integer(1)


def merged(factors: Iterable[Factor]) -> Dim:
    """A dimension of these factors: size-one factors dropped, neighbouring free factors as one."""
    dim: list[Factor] = []
    for f in factors:
        if isinstance(f, Tokens) and not f.prunable:
            f = Free(sympy.Integer(f.dense))
        if isinstance(f, Free) and f.size == 1:
            continue
        if isinstance(f, Free) and dim and isinstance(dim[-1], Free):
            dim[-1] = Free(dim[-1].size * f.size)
        elif isinstance(f, Part) and dim and f.at == 1 and dim[-1] == replace(f, at=0):
            dim[-1] = f.whole
        else:
            dim.append(f)
    return tuple(dim)


def plain(size: int | torch.SymInt | Size, batch: Batch) -> Dim:
    """The dimension of a size that does not run over tokens: samples where the batch symbol divides it."""
    return _plain(expr(size), batch)


@cache
def _plain(size: Size, batch: Batch) -> Dim:
    rest = sympy.cancel(size / batch.size)
    if size != 0 and batch.size.free_symbols and not rest.free_symbols & batch.size.free_symbols and rest.is_integer:
        return merged((batch, Free(rest)))
    return merged((Free(size),))


def tokens_in(dim: Dim) -> Tokens | None:
    """The token factor of a dimension, if it has one."""
    return next((f for f in dim if isinstance(f, Tokens)), None)


def lines_in(dim: Dim) -> tuple[Line, ...]:
    """The rows, the columns or both that a dimension runs over."""
    return tuple(f for f in dim if isinstance(f, Line))


def followed(dim: Dim) -> Tokens | Line | None:
    """What of a dimension gets shorter: its tokens, or the first of rows and columns."""
    return next((f for f in dim if isinstance(f, Tokens | Line)), None)


def meet(a: Factor, b: Factor) -> bool:
    """Whether entries of two factors belong together, one by one."""
    if isinstance(a, Tokens) and isinstance(b, Tokens):
        return a.same_sequence(b)
    if isinstance(a, Line) and isinstance(b, Line):
        return replace(a, start=b.start) == b
    return a == b


def resized(dim: Dim, size: int | torch.SymInt | Size, batch: Batch) -> Dim | None:
    """The dimension once an op picked or joined entries; None where these are samples that keep tokens of their own.

    Args:
        dim: before, neither over tokens nor over rows or columns.
        size: after.
        batch: the factor of samples.
    """
    if not any(isinstance(f, Batch) for f in dim):
        return plain(size, batch)
    if dim_size(dim) == expr(size):
        return dim
    return (Maps(expr(size), True),) if isinstance(batch, Maps) else None


def sequence_in(layout: Layout) -> Tokens | None:
    """The whole sequence that a layout runs over first, also where it lies on a grid."""
    first = next((t for dim in layout if (t := tokens_in(dim))), None)
    return first.whole if isinstance(first, Part) else first


def over_samples(layout: Layout) -> int | None:
    """The dimension that runs over samples; None where there is one sample and no such dimension."""
    return next((d for d, dim in enumerate(layout) if any(isinstance(f, Batch) for f in dim)), None)


def on_grid(tokens: Tokens, rows: int, columns: int) -> tuple[Dim, Dim]:
    """The two dimensions of tokens on a grid; one row or column is none."""
    if rows == 1 or columns == 1:
        return ((), merged((tokens,))) if rows == 1 else (merged((tokens,)), ())
    sizes = (rows, columns)
    return (Part(tokens.pieces, False, 0, sizes),), (Part(tokens.pieces, False, 1, sizes),)


def whole_grids(layout: Layout) -> bool:
    """Whether each grid of tokens has both its rows and its columns, once."""
    parts = [f for dim in layout for f in dim if isinstance(f, Part)]
    return all(sum(other == replace(f, at=at) for other in parts) == 1 for f in parts for at in (0, 1))


def runs_over_tokens(layout: Layout) -> bool:
    return any(tokens_in(dim) is not None for dim in layout)


def holds_lines(layout: Layout) -> bool:
    return any(isinstance(f, Line) for dim in layout for f in dim)


def whole_lines(layout: Layout) -> bool:
    """Whether rows and columns lie in dimensions of their own, each alone or columns folded into rows."""
    return all(
        [f.at for f in lines] in ([0], [1], [0, 1]) and len(lines) == len(dim)
        for dim in layout
        if (lines := lines_in(dim))
    )


def show(layout: Layout) -> str:
    """A layout as text, for messages: `[batch, tokens(197), 384]`."""

    def name(f: Factor) -> str:
        if isinstance(f, Part):
            return f"{'columns' if f.at else 'rows'}({f.dense})"
        if isinstance(f, Tokens):
            return f"tokens({f.dense})"
        if isinstance(f, Line):
            return f"{'columns' if f.at else 'rows'}({f.count})"
        if isinstance(f, Batch):
            return "batch" if f.sequences == 1 else f"{f.sequences}*batch"
        return str(f.size)

    return "[" + ", ".join("*".join(map(name, dim)) or "1" for dim in layout) + "]"
