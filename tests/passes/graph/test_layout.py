"""Layouts: which factor is where, before and after a view."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.graph.layout import (
    Batch,
    Dim,
    Factor,
    Fixed,
    Free,
    Layout,
    Line,
    Maps,
    Part,
    Prunable,
    Tokens,
    dim_size,
    factor_size,
    holds_lines,
    meet,
    merged,
    plain,
    resized,
    runs_over_tokens,
    sequences,
    show,
    tokens_in,
    whole_lines,
)
from passes.graph.regroup import regroup

SYMBOL = sympy.Symbol("s", positive=True, integer=True)
BATCH = Batch(SYMBOL)
SEQUENCE = Tokens((Fixed(1), Prunable(6)))
PATCHES = Tokens((Prunable(6),))
GRID = tuple(Part(PATCHES.pieces, at=at, sizes=(2, 3)) for at in (0, 1))
MAPS, ROWS, COLUMNS = Maps(SYMBOL), Line(0, 10), Line(1, 7)
SAMPLES = 11  # prime, and no other size


def free(size: int) -> Free:
    return Free(sympy.Integer(size))


def dims(*factors: Factor) -> Layout:
    """One dimension a factor."""
    return tuple((f,) for f in factors)


def test_sequences_of_a_sample() -> None:
    assert [sequences(size) for size in (SYMBOL, 4 * SYMBOL, SYMBOL + 1, SYMBOL**2, sympy.Integer(4), SYMBOL / 2)] == [
        1, 4, None, None, None, None
    ]  # fmt: skip
    windows = Batch(4 * SYMBOL)
    assert (windows.sequences, Batch(sympy.Integer(3)).sequences) == (4, 1)
    assert plain(8 * SYMBOL, windows) == (windows, free(2))
    assert plain(SYMBOL, windows) == (Free(SYMBOL),) and plain(0, windows) == (free(0),)
    assert show(((windows, SEQUENCE), (free(3),))) == "[4*batch*tokens(7), 3]"


def test_tokens_of_joins_fixed_neighbours_and_drops_empty_pieces() -> None:
    assert Tokens.of([Fixed(1), Prunable(0), Fixed(2), Prunable(5), Fixed(0)]).pieces == (
        Fixed(3),
        Prunable(5),
    )
    assert Tokens.of([Prunable(2), Prunable(2)]).pieces == (Prunable(2), Prunable(2))
    assert Tokens.of([Prunable(2)], weights=True).weights


def test_tokens_lengths() -> None:
    tokens = Tokens((Fixed(2), Prunable(5), Fixed(1)))
    assert (tokens.dense, tokens.compact(3), tokens.prunable) == (8, 6, True)
    assert Tokens((Prunable(5), Fixed(1), Prunable(5))).compact(2) == 5
    assert not Tokens((Fixed(3),)).prunable
    assert tokens.same_sequence(Tokens(tokens.pieces, weights=True))
    assert not tokens.same_sequence(Tokens((Fixed(3), Prunable(5))))


@pytest.mark.parametrize(
    ("position", "border"),
    [(0, (0, 0)), (1, (1, 0)), (2, (2, 0)), (3, None), (6, None), (7, (2, 1)), (8, (3, 1)), (9, None)],
)
def test_border(position: int, border: tuple[int, int] | None) -> None:
    assert Tokens((Fixed(2), Prunable(5), Fixed(1))).border(position) == border


@pytest.mark.parametrize(
    ("start", "stop", "pieces"),
    [
        (0, 1, (Fixed(1),)),
        (1, 7, (Fixed(1), Prunable(5))),
        (2, 7, (Prunable(5),)),
        (2, 8, (Prunable(5), Fixed(1))),
        (0, 8, (Fixed(2), Prunable(5), Fixed(1))),
        (7, 8, (Fixed(1),)),
        (2, 2, ()),
        (2, 6, None),
        (3, 7, None),
        (3, 6, None),
    ],
)
def test_cut(start: int, stop: int, pieces: tuple[Fixed | Prunable, ...] | None) -> None:
    cut = Tokens((Fixed(2), Prunable(5), Fixed(1)), weights=True).cut(start, stop)
    assert (None if cut is None else cut.pieces) == pieces
    assert cut is None or cut.weights


def test_merged() -> None:
    assert merged((free(1), free(2), free(3), BATCH, free(1))) == (free(6), BATCH)
    assert merged((free(1),)) == ()
    assert merged((free(2), Tokens((Fixed(3),)), free(2))) == (free(12),)  # nothing can leave: a plain dimension
    assert merged((Tokens((Fixed(1),)),)) == ()
    assert merged((free(2), SEQUENCE, free(3))) == (free(2), SEQUENCE, free(3))


@pytest.mark.parametrize(
    ("size", "dim"),
    [
        (5, (free(5),)),
        (1, ()),
        (SYMBOL, (BATCH,)),
        (4 * SYMBOL, (BATCH, free(4))),
        (SYMBOL + 1, (Free(SYMBOL + 1),)),  # no whole number of samples
        (SYMBOL**2, (Free(SYMBOL**2),)),
        (sympy.Symbol("t") * 2, (Free(sympy.Symbol("t") * 2),)),  # another symbol
    ],
)
def test_plain(size: sympy.Expr | int, dim: Dim) -> None:
    assert plain(size, BATCH) == dim


def test_sizes_and_text() -> None:
    layout: Layout = ((BATCH, free(2)), (SEQUENCE,), (), (free(8),))
    assert [dim_size(d) for d in layout] == [2 * SYMBOL, 7, 1, 8]
    assert show(layout) == "[batch*2, tokens(7), 1, 8]"
    assert tokens_in(layout[1]) == SEQUENCE and tokens_in(layout[0]) is None
    assert runs_over_tokens(layout) and not runs_over_tokens(((BATCH,), ()))


@pytest.mark.parametrize(
    ("layout", "shape", "after"),
    [
        (dims(BATCH, SEQUENCE, free(8)), (SYMBOL, 7, 2, 4), "[batch, tokens(7), 2, 4]"),
        (dims(BATCH, SEQUENCE, free(2), free(4)), (SYMBOL * 7, 8), "[batch*tokens(7), 8]"),
        (((BATCH, SEQUENCE), (free(8),)), (SYMBOL, 7, 8), "[batch, tokens(7), 8]"),
        (dims(BATCH, free(2), SEQUENCE, free(4)), (SYMBOL * 2, 7, 4), "[batch*2, tokens(7), 4]"),
        (((BATCH, free(2)), (SEQUENCE,), (free(4),)), (SYMBOL, 2, 7, 4), "[batch, 2, tokens(7), 4]"),
        (dims(BATCH, SEQUENCE, free(8)), (SYMBOL, 1, 7, 1, 8), "[batch, 1, tokens(7), 1, 8]"),
        (dims(BATCH, SEQUENCE, free(6), free(4)), (SYMBOL, 7, 8, 3), "[batch, tokens(7), 8, 3]"),
        (dims(BATCH, SEQUENCE, free(8)), (SYMBOL, 56), "[batch, tokens(7)*8]"),
        (dims(BATCH, SEQUENCE, free(14)), (SYMBOL, 14, 7), "[batch, tokens(7)*2, 7]"),
        (dims(BATCH, free(14), SEQUENCE), (SYMBOL, 7, 14), "[batch, 7, 2*tokens(7)]"),
        (dims(BATCH, free(3), SEQUENCE), (SYMBOL, 7, 3), None),  # the sizes fit, the tokens do not
        (dims(BATCH, PATCHES, free(8)), (SYMBOL, 2, 3, 8), "[batch, rows(2), columns(3), 8]"),
        (dims(BATCH, PATCHES, free(8)), (SYMBOL, 2, 24), "[batch, rows(2), columns(3)*8]"),
        (dims(BATCH, PATCHES, free(8)), (SYMBOL * 2, 3, 8), "[batch*rows(2), columns(3), 8]"),
        (dims(BATCH, *GRID, free(8)), (SYMBOL, 6, 8), "[batch, tokens(6), 8]"),
        (dims(BATCH, *GRID, free(8)), (SYMBOL, 3, 2, 8), "[batch, rows(3), columns(2), 8]"),
        (dims(BATCH, *GRID[::-1], free(8)), (SYMBOL, 6, 8), "[batch, columns(3)*rows(2), 8]"),
        (dims(BATCH, free(8), *GRID), (SYMBOL, 8, 6), "[batch, 8, tokens(6)]"),
        (dims(BATCH, PATCHES, free(8)), (SYMBOL, 1, 2, 3, 4, 2), "[batch, 1, rows(2), columns(3), 4, 2]"),
        (dims(BATCH, Tokens((Prunable(12),)), free(8)), (SYMBOL, 2, 2, 3, 8), None),  # windows
        (dims(BATCH, Tokens((Fixed(2), Prunable(4))), free(8)), (SYMBOL, 2, 3, 8), None),
        (dims(BATCH, Tokens((Prunable(6),), weights=True)), (SYMBOL, 2, 3), None),
        (dims(BATCH, SEQUENCE, free(8)), (SYMBOL, 7, 9), None),  # no view at all
        (dims(BATCH, SEQUENCE), (SYMBOL * 7, 2), None),
        (dims(free(4), BATCH, SEQUENCE), (2 * SYMBOL, 14), None),  # four and the samples interleave
        (dims(MAPS, free(4), ROWS, COLUMNS), (SYMBOL, 4, 70), "[batch, 4, rows(10)*columns(7)]"),
        (((MAPS,), (ROWS, COLUMNS), (free(4),)), (SYMBOL, 10, 7, 2, 2), "[batch, rows(10), columns(7), 2, 2]"),
        (((MAPS,), (ROWS, COLUMNS), (free(4),)), (SYMBOL, 7, 10, 4), None),
        (dims(MAPS, free(4), ROWS, COLUMNS), (SYMBOL, 4, 5, 2, 7), None),  # windows
        (dims(MAPS, free(4), Line(0, 1), COLUMNS), (SYMBOL, 4, 7), "[batch, 4, rows(1)*columns(7)]"),
        (dims(MAPS, ROWS, Line(1, 1), free(4)), (SYMBOL, 10, 4), "[batch, rows(10)*columns(1), 4]"),
        (dims(MAPS, free(4), ROWS, Line(1, 1)), (SYMBOL, 2, 2, 10, 1), "[batch, 2, 2, rows(10), columns(1)]"),
        (dims(Maps(8 * SYMBOL), free(4), COLUMNS), (SYMBOL, 8, 4, 7), "[batch, 8, 4, columns(7)]"),
        (dims(Maps(8 * SYMBOL), free(4), COLUMNS), (8, SYMBOL, 4, 7), "[8, batch, 4, columns(7)]"),
    ],
)
def test_regroup(layout: Layout, shape: tuple[sympy.Expr | int, ...], after: str | None) -> None:
    found = regroup(layout, shape)
    assert (None if found is None else show(found)) == after


def test_rows_and_columns() -> None:
    layout: Layout = ((MAPS,), (free(4),), (ROWS, COLUMNS))
    assert holds_lines(layout) and not holds_lines(layout[:2]) and dim_size(layout[2]) == 70
    assert whole_lines(layout) and whole_lines(dims(MAPS, COLUMNS, ROWS))
    assert not any(whole_lines((dim,)) for dim in ((COLUMNS, ROWS), (free(4), ROWS), (ROWS, free(4), COLUMNS)))
    assert meet(ROWS, Line(0, 10, start=Fraction(1, 2))) and not meet(ROWS, Line(0, 10, 2)) and not meet(ROWS, COLUMNS)


def test_samples_that_an_op_picks_or_joins() -> None:
    """Of maps they are parted; tokens are kept for each sample, so nothing may."""
    assert resized((MAPS,), SYMBOL, MAPS) == (MAPS,) and resized((BATCH,), SYMBOL, BATCH) == (BATCH,)
    assert resized((MAPS,), 2 * SYMBOL, MAPS) == (Maps(2 * SYMBOL, True),) and resized((BATCH,), 1, BATCH) is None
    assert resized((free(4),), 3, BATCH) == (free(3),)
    halves = regroup(dims(Maps(2 * SYMBOL, True), free(3)), (2, SYMBOL, 3))
    assert halves == ((free(2),), (Maps(SYMBOL, True),), (free(3),))


@st.composite
def views(draw: st.DrawFn) -> tuple[Layout, list[sympy.Expr | int]]:
    """A layout, and the shape of a view of it: the same atoms grouped differently."""
    others = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3))
    factors: list[Factor] = draw(st.permutations([BATCH, SEQUENCE, *map(free, others)]))

    def grouped(atoms: list) -> list[list]:
        cuts = sorted(draw(st.sets(st.integers(1, len(atoms)), max_size=3)) | {len(atoms)})
        return [atoms[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]

    atoms: list[sympy.Expr | int] = []
    for f in factors:
        size = factor_size(f)
        split = {4: [2, 2], 6: draw(st.sampled_from([[2, 3], [3, 2]]))}.get(size, [size])
        atoms += split if isinstance(f, Free) else [size]
    if draw(st.booleans()):  # now and then a view that may split samples from tokens
        atoms = draw(st.permutations(atoms))
    layout = tuple(merged(group) for group in grouped(factors))
    return layout, [sympy.prod(group) for group in grouped(atoms)]


def identity(layout: Layout, kind: type) -> torch.Tensor:
    """A tensor of this layout whose entries say which token (or sample) they belong to."""
    factors = [f for dim in layout for f in dim]
    sizes = [int(factor_size(f).subs(SYMBOL, SAMPLES)) for f in factors]
    at = next(i for i, f in enumerate(factors) if isinstance(f, kind))
    places = torch.arange(sizes[at]).reshape([-1 if i == at else 1 for i in range(len(sizes))])
    return places.expand(sizes).reshape([int(dim_size(d).subs(SYMBOL, SAMPLES)) for d in layout])


@given(view=views())
def test_regroup_agrees_with_torch(view: tuple[Layout, list[sympy.Expr | int]]) -> None:
    """A regrouping is found where tokens and samples stay whole, and says of every entry whose it is."""
    layout, shape = view
    sizes = [int(sympy.sympify(s).subs(SYMBOL, SAMPLES)) for s in shape]
    found = regroup(layout, shape)
    if found is not None:
        for kind in (Tokens, Batch):
            assert torch.equal(identity(layout, kind).reshape(sizes), identity(found, kind)), show(found)
    borders = [math.prod(sizes[i:]) for i in range(len(sizes) + 1)]
    whole, inner = True, 1
    for f in reversed([f for dim in layout for f in dim]):
        outer = inner * int(factor_size(f).subs(SYMBOL, SAMPLES))
        whole &= isinstance(f, Free) or all(inner % b == 0 or b % outer == 0 for b in borders)
        inner = outer
    assert (found is not None) == whole, f"{show(layout)} to {shape}"


def test_a_lone_sample_keeps_its_place_in_a_view_and_folds_into_anything() -> None:
    one = Batch(sympy.Integer(1))
    stream = dims(one, PATCHES, free(8))
    assert regroup(stream, (1, 6, 2, 4)) == dims(one, PATCHES, free(2), free(4))
    assert regroup(stream, (6, 8)) == dims(PATCHES, free(8))
