"""Who merges into whom, and what comes out: examples worked by hand, and what holds for any numbers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes.sites import matching
from passes.sites.matching import Matched, Order, cosine, most, saliency

FREE = torch.zeros(1, dtype=torch.bool)


def match(features: Tensor, protected: Tensor, r: int, prefix: int, suffix: int, order: Order) -> Matched:
    return matching.match(cosine(features), protected, r, prefix, suffix, order)


def merge(x: Tensor, sizes: Tensor, matched: Matched, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    (short,), sizes = matching.merge([x], sizes, matched, weights)
    return short, sizes


def guard(count: int, *protected: int) -> Tensor:
    return torch.tensor([t in protected for t in range(count)])


def angles(*degrees: float) -> Tensor:
    """Unit vectors [1, N, 2]: the nearer in angle, the more alike."""
    radians = torch.tensor(degrees) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], -1).unsqueeze(0)


def pairs(matched: Matched) -> list[tuple[int, int]]:
    return list(zip(matched.sources[0].tolist(), matched.destinations[0].tolist(), strict=True))


# positions:    0  1   2   3   4   5    edges 0-1 10 degrees, 2-3 3, 4-5 20
SIX = angles(0, 10, 50, 53, 120, 140)


def test_the_strongest_edges_merge_each_into_its_nearest() -> None:
    one = match(SIX, FREE, 1, 0, 0, "sequence")
    assert pairs(one) == [(2, 3)]
    assert one.left.tolist() == [[0, 1, 3, 4, 5]]
    assert one.place.tolist() == [[0, 1, 2, 2, 3, 4]]
    two = match(SIX, FREE, 2, 0, 0, "sequence")
    assert pairs(two) == [(2, 3), (0, 1)]
    assert (two.left.tolist(), two.place.tolist()) == ([[1, 3, 4, 5]], [[0, 0, 1, 1, 2, 3]])


def test_several_sources_may_share_a_destination() -> None:
    matched = match(angles(8, 10, 13, 170, 9, 90), FREE, 3, 0, 0, "sequence")
    assert pairs(matched) == [(4, 1), (0, 1), (2, 1)]
    assert (matched.left.tolist(), matched.place.tolist()) == ([[1, 3, 5]], [[0, 0, 0, 1, 0, 2]])


def test_length_does_not_count_only_direction() -> None:
    stretched = SIX * torch.tensor([5.0, 0.1, 3.0, 7.0, 0.5, 2.0]).view(1, 6, 1)
    assert pairs(match(stretched, FREE, 2, 0, 0, "sequence")) == [(2, 3), (0, 1)]


@pytest.mark.parametrize(
    ("order", "left"),
    [("sequence", [0, 1, 3, 4, 5]), ("even-odd", [0, 4, 1, 3, 5]), ("strength", [0, 4, 1, 3, 5])],
)
def test_order_of_the_tokens_left(order: Order, left: list[int]) -> None:
    assert match(SIX, FREE, 1, 0, 0, order).left.tolist() == [left]


def test_without_a_class_token_tome_leaves_the_rest_by_strength() -> None:
    features = angles(0, 30, 50, 53, 120, 140)  # 0-1 now is the weakest edge
    assert match(features, FREE, 1, 0, 0, "strength").left.tolist() == [[4, 0, 1, 3, 5]]
    assert match(features, FREE, 1, 0, 0, "even-odd").left.tolist() == [[0, 4, 1, 3, 5]]


def test_protected_tokens_at_the_ends_stay_where_they_are() -> None:
    """A class token's row and a distillation token's column are out; ToMe's [unm0, dst0, unm rest, dst rest]."""
    features = angles(53, 50, 51, 120, 122, 180, 181, 10)
    matched = match(features, guard(8, 0, 1), 1, 2, 0, "even-odd")
    assert pairs(matched) == [(6, 5)]
    assert matched.left.tolist() == [[0, 1, 2, 4, 3, 5, 7]]
    matched = match(features, guard(8, 0, 7), 2, 1, 1, "even-odd")
    assert pairs(matched) == [(2, 1), (6, 5)]
    assert matched.left.tolist() == [[0, 4, 1, 3, 5, 7]]
    assert matched.place.tolist() == [[0, 2, 2, 3, 1, 4, 4, 5]]


def test_a_protected_token_in_the_middle_is_neither_source_nor_destination() -> None:
    features = torch.cat([SIX, SIX])
    by_sample = torch.stack([guard(6, 2), guard(6, 3)])
    matched = match(features, by_sample, 2, 0, 0, "sequence")
    assert matched.sources.tolist() == [[0, 4], [4, 0]] or matched.sources.tolist() == [[0, 4], [0, 4]]
    assert matched.destinations[0].tolist() == [1, 5]
    assert 3 not in matched.destinations[1].tolist()


def test_equal_edges_go_to_the_earlier_source_and_destination() -> None:
    """Directions whose cosines are exact in floats, so that equal means equal."""
    a, b = [1.0, 0.0], [0.0, 1.0]
    matched = match(torch.tensor([[a, a, a, a, a, a, b, b]]), FREE, 2, 0, 0, "sequence")
    assert pairs(matched) == [(0, 1), (2, 1)]
    corners = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, -1.0, 1.0]]])
    assert pairs(match(corners, FREE, 1, 0, 0, "sequence")) == [(0, 1)]


def test_a_token_of_zeros_is_no_division_by_zero() -> None:
    features = SIX.clone()
    features[0, 2] = 0
    matched = match(features, FREE, 1, 0, 0, "sequence")
    assert pairs(matched) == [(0, 1)]


@pytest.mark.parametrize(
    ("count", "prefix", "suffix", "extra", "able"),
    [
        (197, 1, 0, 0, 98),  # ToMe: (T - protected) // 2
        (198, 2, 0, 0, 98),
        (2352, 0, 0, 0, 1176),  # vid-TLDR: T // 2
        (17, 0, 0, 0, 8),  # nine sources, but at most T // 2
        (16, 0, 0, 3, 5),
        (5, 5, 0, 0, 0),
        (2, 1, 0, 0, 0),
        (1, 0, 0, 0, 0),
        (6, 5, 0, 0, 0),
    ],
)
def test_how_many_may_merge(count: int, prefix: int, suffix: int, extra: int, able: int) -> None:
    assert most(count, prefix, suffix, extra) == able


def sizes_of(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


# None on a CPU; what a GPU writes over may be anything
OVER = [None, torch.tensor([[7.0, -1.0, 2.0]])]


@pytest.mark.parametrize("over", OVER)
def test_a_weighted_mean_by_hand(over: Tensor | None) -> None:
    x = torch.tensor([[[1.0, 10.0], [4.0, 40.0], [7.0, 70.0]]])
    matched = Matched(*(torch.tensor([t]) for t in ([0, 2], [1, 1], [1], [1, 1, 1], [1, 0, 2])), over)
    short, sizes = merge(x, sizes_of(2, 1, 3), matched, None)
    assert sizes.tolist() == [[6.0]]
    torch.testing.assert_close(short, torch.tensor([[[27.0 / 6, 270.0 / 6]]]))


@pytest.mark.parametrize("over", [None, torch.zeros(1, 4)])
def test_vid_tldr_weighs_sources_only(over: Tensor | None) -> None:
    """x_b <- (n_b x_b + sum s_a n_a x_a) / (n_b + sum s_a n_a)."""
    x = torch.tensor([[[1.0], [4.0], [7.0], [9.0]]])
    matched = Matched(*(torch.tensor([t]) for t in ([0, 2], [1, 1], [1, 3], [1, 1, 1, 3], [2, 0, 3, 1])), over)
    short, sizes = merge(x, sizes_of(2, 3, 1, 5), matched, torch.tensor([[0.5, 0.9, 0.0, 0.1]]))
    assert sizes.tolist() == [[4.0, 5.0]]
    torch.testing.assert_close(short, torch.tensor([[[(3 * 4.0 + 0.5 * 2 * 1.0) / 4], [9.0]]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tokens_that_nothing_merges_into_are_unchanged_to_the_bit(dtype: torch.dtype) -> None:
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    matched = match(x, FREE, 2, 0, 0, "sequence")
    short, _ = merge(x, torch.rand(2, 9) + 1, matched, None)
    assert short.dtype == dtype
    for b in range(2):
        for i, t in enumerate(matched.left[b].tolist()):
            if t not in matched.destinations[b].tolist():
                assert torch.equal(short[b, i], x[b, t])


def test_a_double_stays_a_double() -> None:
    x = torch.tensor([[[1.0], [1.0 + 1e-12]]], dtype=torch.float64)
    short, _ = merge(x, torch.ones(1, 2), match(x, FREE, 1, 0, 0, "sequence"), None)
    assert short.item() == pytest.approx(1.0 + 5e-13, abs=1e-15)


def test_saliency_by_hand() -> None:
    """e = 0, 1, 3, 4: above the mean of the normalised (0.5) lie 0.25 and 0.5, which becomes 1."""
    score = torch.tensor([[1.0, 2.0, 4.0, 5.0]])
    torch.testing.assert_close(saliency(score, FREE), torch.tensor([[0.0, 0.0, 0.5, 1.0]]))
    torch.testing.assert_close(saliency(score * 7 - 3, FREE), torch.tensor([[0.0, 0.0, 0.5, 1.0]]))


def test_protected_tokens_do_not_shift_the_saliency_of_others() -> None:
    score = torch.tensor([[1e6, 1.0, 2.0, 4.0, 5.0], [-1e6, 1.0, 2.0, 4.0, 5.0]])
    wanted = torch.tensor([[0.0, 0.0, 0.5, 1.0]] * 2)
    torch.testing.assert_close(saliency(score, guard(5, 0))[:, 1:], wanted, atol=1e-4, rtol=0)


def test_equal_scores_make_no_token_salient() -> None:
    assert saliency(torch.full((2, 5), 3.0), FREE).eq(0).all()


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, int, int, Any]:
    count, prefix, suffix = draw(st.integers(2, 24)), draw(st.integers(0, 5)), draw(st.integers(0, 2))
    seed, channels = draw(st.integers(0, 999)), draw(st.sampled_from((1, 2, 8)))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, count, channels, generator=generator)
    if draw(st.booleans()):  # ties, many of them
        x = x.sign()
    sizes = torch.randint(1, 9, (3, count), generator=generator).float()
    suffix = min(suffix, count)
    prefix = min(prefix, count - suffix)
    able = most(count, prefix, suffix, 0)
    order = draw(st.sampled_from(("sequence", "even-odd", "strength")))
    return x, sizes, guard(count, *range(prefix), *range(count - suffix, count)), prefix, suffix, able, order


@given(problem=problems(), data=st.data())
def test_what_holds_for_any_tokens(problem: Any, data: st.DataObject) -> None:
    x, sizes, protected, prefix, suffix, able, order = problem
    r, count = data.draw(st.integers(0, able)), x.shape[1]
    matched = match(x, protected, r, prefix, suffix, order)
    short, left = merge(x, sizes, matched, None)
    for b in range(3):
        sources, stay = matched.sources[b].tolist(), matched.left[b].tolist()
        assert len(set(sources)) == r and all(s % 2 == 0 for s in sources)
        assert all(d % 2 == 1 for d in matched.destinations[b].tolist())
        touched = {*sources, *matched.destinations[b].tolist()}
        assert not any(protected[t] for t in touched)
        assert sorted(sources + stay) == list(range(count))
        assert stay[:prefix] == list(range(prefix)) and stay[len(stay) - suffix :] == list(range(count - suffix, count))
        if order == "sequence":
            assert stay == sorted(stay)
        place = matched.place[b].tolist()
        assert all(stay[place[t]] == t for t in stay)
        assert all(stay[place[s]] == d for s, d in zip(sources, matched.destinations[b].tolist(), strict=True))
    assert left.sum(1).tolist() == sizes.sum(1).tolist()  # whole numbers: exact
    torch.testing.assert_close(
        (short * left.unsqueeze(-1)).sum(1), (x * sizes.unsqueeze(-1)).sum(1), atol=1e-3, rtol=1e-4
    )
    again = match(x, protected, r, prefix, suffix, order)
    assert all(torch.equal(a, b) for a, b in zip(matched[:-1], again[:-1], strict=True))
    alone = match(x[1:2], protected, r, prefix, suffix, order)
    assert torch.equal(alone.left, matched.left[1:2]) or x.shape[-1] > 1  # products of one channel are exact


@given(problem=problems(), data=st.data())
def test_a_gpu_finds_the_same_without_sorting(problem: Any, data: st.DataObject) -> None:
    x, sizes, protected, prefix, suffix, able, order = problem
    r = data.draw(st.integers(0, able))
    weights = torch.rand(sizes.shape) if data.draw(st.booleans()) else None
    wanted = match(x, protected, r, prefix, suffix, order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_compares", lambda _: True)
        found = match(x, protected, r, prefix, suffix, order)
    assert wanted.over is None and found.over is not None
    assert all(torch.equal(a, b) for a, b in zip(found[:-1], wanted[:-1], strict=True))
    for a, b in zip(merge(x, sizes, found, weights), merge(x, sizes, wanted, weights), strict=True):
        torch.testing.assert_close(a, b)


def test_wards_cost() -> None:
    """What a merge adds to the squared distances of single tokens from the mean of their own."""
    torch.manual_seed(0)
    members = [torch.randn(n, 5) for n in (1, 3, 2, 4)]
    sizes, means = sizes_of(1, 3, 2, 4), torch.stack([m.mean(0) for m in members]).unsqueeze(0)

    def spread(x: Tensor) -> Tensor:
        return (x - x.mean(0)).square().sum()

    cost = -matching.ward([means[..., :2], means[..., 2:]], sizes, None)
    for i, j in itertools.product(range(2), range(2)):
        a, b = members[2 * i], members[2 * j + 1]
        torch.testing.assert_close(cost[0, i, j], spread(torch.cat([a, b])) - spread(a) - spread(b))
    weights = torch.tensor([[4.0, 1.0, 9.0, 16.0]])
    weighted = -matching.ward([means], sizes, weights)
    torch.testing.assert_close(weighted, cost * torch.tensor([[[2.0, 4.0], [3.0, 4.0]]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wards_cost_in_half_precision(dtype: torch.dtype) -> None:
    """Squares that half precision cannot hold."""
    features = (200 * torch.randn(1, 8, 512)).to(dtype)
    cost, wanted = (-matching.ward([f], torch.ones(1, 8), None) for f in (features, features.double()))
    assert cost.dtype == torch.float32 and cost.min() > 1e6
    torch.testing.assert_close(cost, wanted.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wards_cost_under_autocast(dtype: torch.dtype) -> None:
    """Which rounds what goes into products, whatever their dtype."""
    features = 50 * torch.randn(1, 8, 512)
    wanted = matching.ward([features], torch.ones(1, 8), None)
    with torch.autocast("cpu", dtype):
        got = matching.ward([features], torch.ones(1, 8), None, autocast=True)
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0)


@pytest.mark.parametrize("compares", [False, True])
def test_several_values_merge_as_each_alone(compares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_compares", lambda _: compares)
    torch.manual_seed(0)
    values, sizes = [torch.randn(2, 9, 4).double(), torch.randn(2, 9, 3).half()], torch.rand(2, 9) + 1
    matched = match(values[0], FREE, 3, 0, 0, "sequence")
    together, left = matching.merge(values, sizes, matched)
    for x, got in zip(values, together, strict=True):
        wanted, count = merge(x, sizes, matched, None)
        assert got.dtype == x.dtype and torch.equal(left, count)
        torch.testing.assert_close(got, wanted)
