"""Masked rows keep what softmax gives; masks that hide nothing go away."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attentions import (
    INF,
    SPELLINGS,
    TOKENS,
    Attention,
    Core,
    assert_same,
    capture,
    lower,
    make,
    names,
)
from torch import Tensor

from passes.attention.attention_kernel import kernels
from passes.attention.lower_attention import LowerAttention


def test_a_wide_mask_over_bfloat16_queries_keeps_masked_rows_uniform() -> None:
    def core(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lowest = torch.full((TOKENS, TOKENS), torch.finfo(torch.float32).min)
        mask = torch.where(m.causal & (torch.arange(TOKENS) > 0), 0.0, lowest)
        return F.softmax((q @ k.mT).float() + mask, dim=-1).to(q.dtype) @ v

    model, x = make(core)
    model, x = model.bfloat16(), x.bfloat16()
    result = LowerAttention()(capture(model, x))
    assert result.rewrites == 1
    torch.testing.assert_close(result.gm(x), model(x), atol=2e-2, rtol=2e-2)


def rows(hide: Callable[[Tensor], Tensor], value: float) -> Core:
    """Hides key j from query i where `hide(q)` [B, H, N, 1] says so: whole rows."""

    def core(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(hide(q).expand(-1, -1, -1, TOKENS), value).softmax(-1) @ v

    return core


@pytest.mark.parametrize("value", [-INF, -1e4, torch.finfo(torch.float32).min])
def test_rows_masked_by_the_input_give_what_softmax_gives(value: float) -> None:
    model, x, result = lower(rows(lambda q: q[..., :1] > 0, value))
    assert (result.rewrites, result.skips) == (1, ())
    wanted, got = model(x), result.gm(x)
    assert wanted.isnan().any() == (value == -INF)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0, equal_nan=True)


def test_rows_masked_by_an_added_mask_give_what_softmax_gives() -> None:
    def core(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + torch.where(q[..., :1] > 1.0, -INF, 0.0)).softmax(-1) @ v

    model, x, result = lower(core)
    assert result.rewrites == 1 and model(x).isnan().any()
    torch.testing.assert_close(result.gm(x), model(x), atol=1e-5, rtol=0, equal_nan=True)


def test_a_constant_mask_is_looked_at_before_nan_is_put_back() -> None:
    full = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    full[3] = True

    def mask(hole: Tensor) -> Core:
        return lambda m, q, k, v: (q @ k.mT).masked_fill(hole, -INF).softmax(-1) @ v

    model, x, result = lower(mask(full))
    assert "amax" in names(result.gm)
    torch.testing.assert_close(result.gm(x), model(x), atol=1e-5, rtol=0, equal_nan=True)
    full[3, 0] = False
    assert "amax" not in names(lower(mask(full))[2].gm)
    assert "amax" not in names(lower(SPELLINGS["additive mask"])[2].gm)
    assert "amax" not in names(lower(SPELLINGS["mask from tokens"])[2].gm)


def padding(hidden: int, trainable: bool = False) -> Core:
    """A mask over the batch, as transformers build one for every input; it hides the first `hidden` keys."""

    def core(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = (torch.arange(TOKENS) >= hidden).view(1, 1, 1, TOKENS).expand(q.shape[0], 1, TOKENS, TOKENS)
        mask = torch.where(seen, torch.zeros(()), torch.finfo(q.dtype).min)
        return F.softmax(q @ k.mT * 0.3 + (mask + m.bias * 0 if trainable else mask), dim=-1) @ v

    return core


def test_a_mask_written_to_hide_nothing_goes_away() -> None:
    model, x, result = lower(padding(0))
    [(node, _)] = kernels(result.gm)
    assert len(node.args) == 3 and "where" not in names(result.gm)
    assert_same(model, result.gm, x)


@pytest.mark.parametrize(("hidden", "trainable"), [(1, False), (TOKENS, False), (0, True)])
def test_a_mask_that_hides_something_or_may_learn_to_stays(hidden: int, trainable: bool) -> None:
    model, x, result = lower(padding(hidden, trainable))
    [(node, _)] = kernels(result.gm)
    assert len(node.args) == 4 and "amax" not in names(result.gm)
    torch.testing.assert_close(result.gm(x), model(x), atol=1e-5, rtol=0)
    if hidden < TOKENS:  # flash's backward does not know the weights of a fully masked row
        assert_same(model, result.gm, x)


@pytest.mark.parametrize("hidden", [0, 1, TOKENS])
def test_a_boolean_mask_expanded_over_the_batch(hidden: int) -> None:
    def core(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hole = (torch.arange(TOKENS) < hidden).view(1, 1, 1, TOKENS).expand(q.shape[0], 1, TOKENS, TOKENS)
        return (q @ k.mT).masked_fill(hole, -INF).softmax(-1) @ v

    model, x, result = lower(core)
    assert ("amax" in names(result.gm)) == (hidden == TOKENS)
    torch.testing.assert_close(result.gm(x), model(x), atol=1e-5, rtol=0, equal_nan=True)


def called(mask: Callable[[Attention, Tensor], Tensor], **options: bool) -> Core:
    """SDPA that the model calls itself."""
    return lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, mask(m, q), **options)


def seen(m: Attention, q: Tensor) -> Tensor:
    """As transformers makes one, and only where the model is exported: positions from 0 on."""
    return (torch.arange(TOKENS) + 0 >= 0)[None, None, None].expand(q.shape[0], -1, TOKENS, -1)


IDLE: dict[str, Callable[[Attention, Tensor], Tensor]] = {
    "boolean": seen,
    "added": lambda m, q: torch.zeros(TOKENS, TOKENS),
}
NOT_IDLE: dict[str, Callable[[Attention, Tensor], Tensor]] = {
    "hides one key": lambda m, q: torch.arange(TOKENS).expand(TOKENS, TOKENS) > 0,
    "adds something": lambda m, q: torch.ones(TOKENS, TOKENS).tril(),
    "from the input": lambda m, q: q[..., :1] > -INF,
    "may change": lambda m, q: m.causal | m.causal.mT,
}


@pytest.mark.parametrize("name", IDLE)
def test_a_mask_that_hides_nothing_goes_from_a_call_of_sdpa(name: str) -> None:
    model, x, result = lower(called(IDLE[name]))
    [(node, _)] = kernels(result.gm)
    assert (result.rewrites, node.args[3]) == (1, None)
    assert {"arange", "zeros", "expand"}.isdisjoint(names(result.gm))
    assert_same(model, result.gm, x)
    assert LowerAttention()(result.gm).rewrites == 0


@pytest.mark.parametrize("name", NOT_IDLE)
def test_any_other_stays_in_a_call_of_sdpa(name: str) -> None:
    model, x, result = lower(called(NOT_IDLE[name]))
    [(node, _)] = kernels(result.gm)
    assert result.rewrites == 0 and node.args[3] is not None
    assert_same(model, result.gm, x)


def test_a_mask_by_keyword() -> None:
    model, x, result = lower(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen(m, q)))
    [(_, choice)] = kernels(result.gm)
    assert (result.rewrites, choice.name) == (1, "flash") and "arange" not in names(result.gm)
    assert_same(model, result.gm, x)
