"""Taking tokens out and putting them back, for every order and folding of dimensions, against plain loops."""

from __future__ import annotations

import itertools
import math

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes.axes.gather import or_as_it_left, original_positions, put, stretch_index, take, tokens_first
from passes.graph.layout import Batch, Factor, Fixed, Free, Layout, Piece, Prunable, Tokens, merged

SAMPLES = Batch(sympy.Symbol("s", positive=True, integer=True))
SEQUENCE = Tokens((Fixed(1), Prunable(5)))
PATCHES = Tokens((Prunable(5),))  # the same without the class token
KEPT = torch.tensor([[0, 1, 4], [0, 2, 3]])  # [B, K]
KEPT_PATCHES = KEPT[:, 1:] - 1
INDICES = {SEQUENCE.pieces: KEPT, PATCHES.pieces: KEPT_PATCHES}


def free(size: int) -> Free:
    return Free(sympy.Integer(size))


def size_of(factor: Factor, samples: int) -> int:
    if isinstance(factor, Batch):
        return samples
    return factor.dense if isinstance(factor, Tokens) else int(factor.size)


def numbers(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


def naive_take(full: Tensor, target: Layout, gathered: set[int], kept: Tensor) -> Tensor:
    """One entry after the other: `full` has an axis for every factor, and all samples; so has the result."""
    factors = [(d, f) for d, dim in enumerate(target) for f in dim]
    at = next(i for i, (_, f) in enumerate(factors) if isinstance(f, Batch))
    length = {SEQUENCE: kept.shape[1], PATCHES: kept.shape[1] - 1}
    sizes = [
        length[f] if isinstance(f, Tokens) and d in gathered else full.shape[i] for i, (d, f) in enumerate(factors)
    ]
    out = torch.empty(sizes, dtype=full.dtype)
    for place in itertools.product(*map(range, sizes)):
        source = list(place)
        for i, (d, f) in enumerate(factors):
            if isinstance(f, Tokens) and d in gathered:
                row = kept[place[at]] if f == SEQUENCE else kept[place[at], 1:] - 1
                source[i] = int(row[place[i]])
        out[place] = full[tuple(source)]
    return out


def grouped(value: Tensor, target: Layout) -> Tensor:
    """Folds the factor axes of a value as the layout does."""
    ends = list(itertools.accumulate(len(dim) for dim in target))
    starts = [0, *ends]
    return value.reshape([math.prod(value.shape[a:b]) for a, b in zip(starts, ends, strict=False)])


TARGETS: dict[str, Layout] = {
    "sample first": ((SAMPLES,), (SEQUENCE,), (free(4),)),
    "token first": ((SEQUENCE,), (SAMPLES,), (free(4),)),
    "channels in between": ((SAMPLES,), (free(4),), (SEQUENCE,)),
    "batch and heads folded": ((SAMPLES, free(3)), (SEQUENCE,), (free(2),)),
    "heads before batch": ((free(3), SAMPLES), (SEQUENCE,), (free(2),)),
    "batch and tokens folded": ((SAMPLES, SEQUENCE), (free(4),)),
    "tokens and batch folded": ((SEQUENCE, SAMPLES), (free(4),)),
    "tokens and channels folded": ((SAMPLES,), (SEQUENCE, free(2))),
    "two token dimensions": ((SAMPLES,), (free(2),), (SEQUENCE,), (SEQUENCE,)),
    "two sequences": ((SAMPLES,), (free(2),), (SEQUENCE,), (PATCHES,)),
    "folded, two token dimensions": ((SAMPLES, free(2)), (SEQUENCE,), (SEQUENCE,)),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_take(target: Layout, batch: int) -> None:
    full = numbers(*(size_of(f, batch) for dim in target for f in dim))
    gathered = {d for d, dim in enumerate(target) if any(isinstance(f, Tokens) for f in dim)}
    kept = {pieces: index[:batch] for pieces, index in INDICES.items()}
    taken = take(grouped(full, target), target, sorted(gathered), kept)
    assert torch.equal(taken, grouped(naive_take(full, target, gathered, KEPT[:batch]), target))


@pytest.mark.parametrize(
    ("shape", "target", "gathered"),
    [
        ((6, 6), "two token dimensions", (2, 3)),  # a mask [N, N]: each sample takes its own rows and columns
        ((2, 6, 6), "two token dimensions", (2, 3)),  # a bias [H, N, N]
        ((6, 1), "two token dimensions", (2,)),  # by query
        ((1, 1, 1, 6), "two token dimensions", (3,)),  # by key
        ((6, 4), "sample first", (1,)),  # a table [N, C]
        ((6, 1, 4), "token first", (0,)),
        ((6, 2), "batch and heads folded", (1,)),  # RoPE against [(B H), N, d]
        ((1, 6, 6), "folded, two token dimensions", (1, 2)),
        ((5,), "two sequences", (3,)),
    ],
)
def test_take_from_a_table_without_samples(shape: tuple[int, ...], target: str, gathered: tuple[int, ...]) -> None:
    """A side input that all samples share has its own kept entries for each sample afterwards."""
    layout = TARGETS[target]
    x = numbers(*shape)
    unfolded = x.reshape([1] * (len(layout) - len(shape)) + list(shape))
    for d, dim in reversed(list(enumerate(layout))):
        if len(dim) > 1:  # a folded dimension of size one
            unfolded = unfolded.reshape([*unfolded.shape[:d], *[1] * len(dim), *unfolded.shape[d + 1 :]])
    sizes = [size_of(f, 2) if f == SAMPLES or SAMPLES in dim else -1 for dim in layout for f in dim]
    wanted = grouped(naive_take(unfolded.expand(sizes), layout, set(gathered), KEPT), layout)
    taken = take(x, layout, gathered, INDICES)
    assert torch.equal(taken, wanted)


def test_take_leaves_what_is_already_short() -> None:
    """Logits whose queries are short already lose only their keys."""
    layout = TARGETS["two token dimensions"]
    logits = numbers(2, 2, 3, 6)  # [B, H, K, N]
    taken = take(logits, layout, [3], INDICES)
    assert torch.equal(taken, torch.stack([logits[i][:, :, KEPT[i]] for i in range(2)]))


@st.composite
def targets(draw: st.DrawFn) -> tuple[Layout, tuple[bool, ...]]:
    """A layout with samples, one or two token dimensions and others, and which factors the value has."""
    tokens = draw(st.lists(st.sampled_from([SEQUENCE, PATCHES]), min_size=1, max_size=2))
    others = [free(s) for s in draw(st.lists(st.integers(2, 3), max_size=2))]
    factors: list[Factor] = draw(st.permutations([SAMPLES, *tokens, *others]))
    cuts = sorted(draw(st.sets(st.integers(1, len(factors)))) | {len(factors)})
    layout = tuple(merged(factors[a:b]) for a, b in zip([0, *cuts], cuts, strict=False))
    return layout, tuple(draw(st.booleans()) for _ in layout)


@given(case=targets(), data=st.data())
def test_take_against_loops(case: tuple[Layout, tuple[bool, ...]], data: st.DataObject) -> None:
    layout, there = case
    patches = [sorted(data.draw(st.sets(st.integers(1, 5), min_size=2, max_size=2))) for _ in range(3)]
    kept = torch.tensor([[0, *row] for row in patches])
    sizes = [size_of(f, 3) if yes else 1 for dim, yes in zip(layout, there, strict=True) for f in dim]
    x = numbers(*sizes)
    gathered = {d for d, dim in enumerate(layout) if there[d] and any(isinstance(f, Tokens) for f in dim)}
    if not gathered:
        return
    samples = next(i for i, f in enumerate([f for dim in layout for f in dim]) if isinstance(f, Batch))
    full = x.expand([3 if i == samples else s for i, s in enumerate(x.shape)])
    wanted = naive_take(full, layout, gathered, kept)
    indices = {SEQUENCE.pieces: kept, PATCHES.pieces: kept[:, 1:] - 1}
    taken = take(grouped(x, layout), layout, sorted(gathered), indices)
    # a dimension in which samples are folded with others comes back with all of them
    room = [s for dim, yes in zip(layout, there, strict=True) for s in _room(dim, yes, 3, 3)]
    assert torch.equal(taken.expand(grouped(wanted.expand(room), layout).shape), grouped(wanted.expand(room), layout))


def _room(dim: tuple[Factor, ...], there: bool, batch: int, kept: int) -> list[int]:
    """Sizes after the gather: only samples spread, or everything that is folded with them."""
    whole = any(isinstance(f, Batch) for f in dim) and len(dim) > 1
    sizes = []
    for f in dim:
        if isinstance(f, Tokens):
            sizes.append((kept if f == SEQUENCE else kept - 1) if there else 1)
        else:
            sizes.append(size_of(f, batch) if there or whole or isinstance(f, Batch) else 1)
    return sizes


@pytest.mark.parametrize("target", ["sample first", "token first", "channels in between"])
def test_put_is_the_way_back(target: str) -> None:
    layout = TARGETS[target]
    full = numbers(*(size_of(f, 2) for dim in layout for f in dim))
    tokens = next(d for d, dim in enumerate(layout) if dim == (SEQUENCE,))
    samples = layout.index((SAMPLES,))
    short = take(full, layout, [tokens], INDICES)
    assert torch.equal(put(full, short, KEPT, layout), full)
    changed = put(full, -short - 1, KEPT, layout).movedim((samples, tokens), (0, 1))
    for b in range(2):
        for n in range(6):
            before = full.movedim((samples, tokens), (0, 1))[b, n]
            assert torch.equal(changed[b, n], -before - 1 if n in KEPT[b] else before)


@pytest.mark.parametrize("target", ["sample first", "token first", "channels in between"])
def test_tokens_first(target: str) -> None:
    layout = TARGETS[target]
    full = numbers(*(size_of(f, 2) for dim in layout for f in dim))
    wanted = full.movedim((layout.index((SAMPLES,)), layout.index((SEQUENCE,))), (0, 1))
    assert torch.equal(tokens_first(full, layout), wanted)


@pytest.mark.parametrize("target", ["sample first", "token first", "channels in between"])
def test_or_as_it_left(target: str) -> None:
    layout = TARGETS[target]
    full = numbers(*(size_of(f, 2) for dim in layout for f in dim))
    merged = torch.zeros(2, 6, dtype=torch.bool).scatter(1, KEPT, True)
    order = (layout.index((SAMPLES,)), layout.index((SEQUENCE,)))
    got = or_as_it_left(-full - 1, full, merged, layout).movedim(order, (0, 1))
    for b, n in itertools.product(range(2), range(6)):
        own = full.movedim(order, (0, 1))[b, n]
        assert torch.equal(got[b, n], -own - 1 if n in KEPT[b] else own)


@pytest.mark.parametrize(
    ("site", "pieces", "index", "wanted"),
    [
        ([Fixed(1), Prunable(5)], [Prunable(5)], [0, 2, 5], [1, 4]),  # the class token sliced off
        ([Prunable(5)], [Fixed(2), Prunable(5)], [0, 4], [0, 1, 2, 6]),  # two joined in front
        ([Fixed(2), Prunable(4), Fixed(1)], [Prunable(4)], [0, 1, 3, 5, 6], [1, 3]),  # a suffix
        ([Fixed(1), Prunable(3)], [Prunable(3), Fixed(1), Prunable(3)], [0, 3], [2, 3, 6]),  # twice
        ([Fixed(1), Prunable(3)], [Fixed(1), Prunable(3)], [0, 1, 3], [0, 1, 3]),
    ],
)
def test_stretch_index(site: list[Piece], pieces: list[Piece], index: list[int], wanted: list[int]) -> None:
    found = stretch_index(torch.tensor([index, index]), Tokens(tuple(site)), tuple(pieces))
    assert found.tolist() == [wanted, wanted]


def test_original_positions_compose() -> None:
    first = torch.tensor([[0, 2, 3, 5], [0, 1, 4, 5]])
    second = torch.tensor([[0, 1, 3], [0, 2, 3]])
    third = torch.tensor([[0, 2], [1, 2]])
    assert original_positions(first).tolist() == first.tolist()
    assert original_positions(first, second, third).tolist() == [[0, 5], [4, 5]]
