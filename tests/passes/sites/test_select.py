"""Which tokens stay, against a plain Python sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.sites import score as scores
from passes.sites import select
from passes.sites.select import keep_highest, protected_mask

CPU = torch.device("cpu")
NONE = torch.zeros(6, dtype=torch.bool)


def naive(score: list[float], protected: list[bool], keep: int, lowest: bool = False) -> list[int]:
    """Positions that stay: protected ones, then what is not finite, then by score, ties to the earlier."""

    def rank(i: int) -> tuple[float, ...]:
        s = -score[i] if lowest else score[i]
        unusual = math.isnan(s) or s == math.inf or (s == -math.inf and lowest)
        return (0 if protected[i] else 1 if unusual else 2, 0.0 if protected[i] or unusual else -s, i)

    return sorted(sorted(range(len(score)), key=rank)[:keep])


def test_highest_stay_in_order() -> None:
    score = torch.tensor([[0.1, 0.9, 0.5, 0.7, 0.2, 0.3], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]])
    assert keep_highest(score, NONE, 3).tolist() == [[1, 2, 3], [0, 1, 2]]
    assert keep_highest(score, NONE, 3).dtype == torch.int64
    assert keep_highest(score, NONE, 3, lowest=True).tolist() == [[0, 4, 5], [3, 4, 5]]
    assert keep_highest(score, NONE, 6).tolist() == [list(range(6))] * 2


@pytest.mark.parametrize("lowest", [False, True])
def test_ties_go_to_the_earlier_token(lowest: bool) -> None:
    assert keep_highest(torch.zeros(1, 6), NONE, 3, lowest).tolist() == [[0, 1, 2]]
    score = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 2.0]])
    assert keep_highest(score, NONE, 2, lowest).tolist() == [[0, 2] if lowest else [1, 3]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 3e38])
@pytest.mark.parametrize("lowest", [False, True])
def test_protected_stay_whatever_the_scores(value: float, lowest: bool) -> None:
    protected = torch.tensor([True, False, False, True, False, True])
    kept = keep_highest(torch.full((2, 6), value), protected, 4, lowest)
    assert kept.tolist() == [[0, 1, 3, 5]] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_counts_as_highest(value: float) -> None:
    score = torch.tensor([[5.0, 4.0, 3.0, 2.0, value, 1.0]])
    assert keep_highest(score, NONE, 2).tolist() == [[0, 4]]
    assert keep_highest(score, NONE, 1).tolist() == [[4]]


def test_nan_stays_also_among_the_lowest() -> None:
    assert keep_highest(torch.tensor([[1.0, 2.0, 3.0, math.nan]]), NONE[:4], 2, True).tolist() == [[0, 3]]


def test_protection_may_differ_by_sample() -> None:
    protected = torch.tensor([[True, False, False], [False, False, True]])
    assert keep_highest(torch.tensor([[1.0, 3.0, 2.0]] * 2), protected, 2).tolist() == [[0, 1], [1, 2]]


def test_half_precision_scores() -> None:
    score = torch.tensor([[1.0, 65504.0, math.nan, 2.0]], dtype=torch.float16)
    assert keep_highest(score, NONE[:4], 2).tolist() == [[1, 2]]


# with the least length of a row that is sorted
WAYS = [("topk", 0), ("topk", 16), ("sorts", 0), ("sorts", 16), ("compares", 0)]


def choose(patch: pytest.MonkeyPatch, way: tuple[str, int]) -> None:
    """A way of selecting, all but the first of which only a GPU takes."""
    patch.setattr(select, "way", lambda *_: way[0])
    patch.setattr(select, "shortest_row", lambda _: way[1])


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    choose(monkeypatch, request.param)
    return tuple(request.param)


@pytest.mark.parametrize("metric", ["l2", "l1", "cosine"])
def test_marked_in_the_score_or_after_it_the_same_tokens_stay(way: tuple[str, int], metric: scores.Metric) -> None:
    """A protected token at either end; what is not finite; an overflow; ties."""
    generator = torch.Generator().manual_seed(0)
    after, before = (torch.randn(4, 12, 8, generator=generator) for _ in range(2))
    after[0, 3, 2], after[0, 7, 1], after[1, 5], after[2, 4:9] = math.nan, math.inf, 3e38, 1.0
    before[2, 4:9] = 0.5
    protected = torch.zeros(12, dtype=torch.bool)
    protected[[0, 11]] = True
    for keep in range(2, 13):
        wanted = keep_highest(scores.shift(after, before, metric), protected, keep)
        found = keep_highest(scores.shift(after, before, metric, protected), None, keep)
        assert torch.equal(found, wanted), (keep, found, wanted)


SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, math.nan, math.inf, -math.inf]),
    st.floats(width=32, allow_nan=False),
)


@pytest.mark.parametrize("way", WAYS)
@given(data=st.data(), count=st.integers(1, 9), batch=st.integers(1, 3), lowest=st.booleans())
def test_against_a_plain_sort(way: tuple[str, int], data: st.DataObject, count: int, batch: int, lowest: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        choose(patch, way)
        check_against_a_plain_sort(data, count, batch, lowest)


def check_against_a_plain_sort(data: st.DataObject, count: int, batch: int, lowest: bool) -> None:
    score = data.draw(st.lists(st.lists(SCORES, min_size=count, max_size=count), min_size=batch, max_size=batch))
    # the largest float is what an infinite score counts as
    score = [[s if abs(s) < 3e38 or not math.isfinite(s) else 0.0 for s in row] for row in score]
    protected = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    keep = data.draw(st.integers(sum(protected), count))
    kept = keep_highest(torch.tensor(score), torch.tensor(protected), keep, lowest)
    assert kept.tolist() == [naive(row, protected, keep, lowest) for row in score]
    alone = [keep_highest(torch.tensor([row]), torch.tensor(protected), keep, lowest)[0].tolist() for row in score]
    assert kept.tolist() == alone  # a sample's tokens do not depend on its neighbours


def test_protected_mask() -> None:
    assert protected_mask(6, 1, 2, (), None, CPU).tolist() == [True, False, False, False, True, True]
    assert protected_mask(4, 0, 0, (2,), None, CPU).tolist() == [False, False, True, False]
    positions = torch.tensor([[0, 2, 5, 7], [0, 3, 4, 5]])  # where the four tokens stood at first
    assert protected_mask(4, 1, 0, (5, 3), positions, CPU).tolist() == [
        [True, False, True, False],
        [True, True, False, True],
    ]
