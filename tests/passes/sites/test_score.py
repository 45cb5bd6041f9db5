"""The scores are the formulas of the paper, element by element."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from passes.sites import score
from passes.sites.explicit_attention import attention_logits

METRICS: tuple[score.Metric, ...] = ("l2", "l1", "cosine")


def distance(a: list[float], b: list[float], metric: str) -> float:
    if metric == "l2":
        return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))
    if metric == "l1":
        return sum(abs(p - q) for p, q in zip(a, b, strict=True))
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return 1 - dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))


def naive_map(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> list[list[list[list[float]]]]:
    """softmax(q k^T * scale + mask), [B][H][N][N], one number at a time."""
    found = []
    for b in range(q.shape[0]):
        of_heads = []
        for h in range(q.shape[1]):
            table = []
            for i in range(q.shape[2]):
                row = [float(q[b, h, i] @ k[b, h, j]) * scale for j in range(k.shape[2])]
                if mask is not None:
                    own = mask.expand(q.shape[0], q.shape[1], -1, -1)[b, h]
                    line = own[0 if own.shape[0] == 1 else i]
                    row = [
                        (r if bool(m) else -math.inf) if mask.dtype == torch.bool else r + float(m)
                        for r, m in zip(row, line, strict=True)
                    ]
                top = sum(math.exp(r) for r in row)
                table.append([math.exp(r) / top for r in row])
            of_heads.append(table)
        found.append(of_heads)
    return found


@pytest.mark.parametrize("metric", METRICS)
def test_shift(metric: score.Metric) -> None:
    torch.manual_seed(0)
    after, before = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    wanted = [
        [distance(a, b, metric) for a, b in zip(x, y, strict=True)]
        for x, y in zip(after.tolist(), before.tolist(), strict=True)
    ]
    torch.testing.assert_close(score.shift(after, before, metric), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_float32(metric: score.Metric, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    after, before = torch.randn(2, 5, 512).to(dtype), torch.randn(2, 5, 512).to(dtype)
    found = score.shift(after, before, metric)
    assert found.dtype == torch.float32
    assert torch.equal(found, score.shift(after.float(), before.float(), metric))


def test_float16_does_not_overflow() -> None:
    after = torch.full((1, 1, 4096), 200.0, dtype=torch.float16)  # the sum of squares is 1.6e8
    assert score.shift(after, torch.zeros_like(after)).item() == pytest.approx(12800.0)


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_moved_scores_zero(metric: score.Metric) -> None:
    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    assert score.shift(x, x, metric).abs().max() < 1e-6


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("by_sample", [False, True])
def test_protected_tokens_score_nan_and_the_others_as_before(metric: score.Metric, by_sample: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    after, before = (torch.randn(2, 5, 7, generator=generator).half() for _ in range(2))
    protected = torch.tensor([True, False, False, False, True])
    if by_sample:
        protected = torch.stack([protected, protected.roll(1)])
    plain, marked = score.shift(after, before, metric), score.shift(after, before, metric, protected)
    assert torch.equal(marked.isnan(), protected.expand(2, 5))
    assert torch.equal(marked[~marked.isnan()], plain[~marked.isnan()])  # to the bit


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_beside_protected_tokens_what_is_not_finite_scores_infinity(metric: score.Metric, bad: float) -> None:
    after, before = torch.ones(1, 3, 4), torch.full((1, 3, 4), 0.5)
    after[0, :2, 1] = bad
    found = score.shift(after, before, metric, torch.tensor([True, False, False]))[0]
    assert found[0].isnan() and found[1] == math.inf and found[2].isfinite()


MASKS = {
    "none": None,
    "additive": torch.randn(5, 5, generator=torch.Generator().manual_seed(2)),
    "by head": torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(3)),
    "by key": torch.randn(2, 1, 1, 5, generator=torch.Generator().manual_seed(4)),
    "boolean": torch.ones(5, 5, dtype=torch.bool).tril(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_scores(mask: Tensor | None, scale: float | None) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    maps = torch.tensor(naive_map(q, k, mask, scale or 0.5))
    found = attention_logits(q, k, mask, scale, causal=False).softmax(-1)
    torch.testing.assert_close(found, maps, rtol=1e-5, atol=1e-6)
    by_class = [[sum(maps[b, h, 0, j] for h in range(3)) / 3 for j in range(5)] for b in range(2)]
    torch.testing.assert_close(score.class_attention(found), torch.tensor(by_class), rtol=1e-5, atol=1e-6)
    received = [[sum(maps[b, h, i, j] for h in range(3) for i in range(5)) / 15 for j in range(5)] for b in range(2)]
    torch.testing.assert_close(score.mean_attention(found), torch.tensor(received), rtol=1e-5, atol=1e-6)


def test_random_score() -> None:
    x = torch.zeros(2, 5, 7)
    torch.manual_seed(0)
    first, second = score.random_score(x), score.random_score(x)
    assert first.shape == (2, 5) and first.dtype == torch.float32
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])


def test_attention_entropy_is_high_where_attention_is_sharp_and_finite_where_it_underflows() -> None:
    key = torch.eye(4).expand(1, 2, 4, 4)
    query = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [2e3, 0, 0, 0], [0, 3, 0, 0]]).expand(1, 2, 4, 4)
    sharp = score.attention_entropy(attention_logits(query, key, None, None, causal=False).softmax(-1))
    assert sharp.isfinite().all()
    assert sharp[0, 2] == 0  # all attention on one token
    torch.testing.assert_close(sharp[0, 1], -torch.tensor(4.0).log())  # even over four
    assert sharp[0, 1] < sharp[0, 0] < sharp[0, 3] < sharp[0, 2]
