"""Every spelling of attention becomes one SDPA with the same numbers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from attentions import (
    CHANNELS,
    HEADS,
    INF,
    SPELLINGS,
    TOKENS,
    Attention,
    assert_same,
    capture,
    lower,
    make,
    names,
    opt,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.attention.attention_kernel import kernels
from passes.attention.lower_attention import LowerAttention
from passes.graph.base import source_line
from passes.graph.ops import SDPA


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fires_once_and_keeps_outputs_and_gradients(spelling: str) -> None:
    model, x, result = lower(SPELLINGS[spelling])
    assert (result.rewrites, result.skips) == (1, ())
    assert names(result.gm).count("scaled_dot_product_attention") == 1
    assert not {"softmax", "matmul", "bmm", "baddbmm", "einsum"} & (
        set(names(result.gm)) - ({"einsum"} if spelling == "mask from tokens" else set())
    )
    assert_same(model, result.gm, x)
    assert_same(model, result.gm, x[:1])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_runs_on_the_flash_kernel(spelling: str) -> None:
    _, _, result = lower(SPELLINGS[spelling])
    [(node, choice)] = kernels(result.gm)
    assert choice.name == "flash", choice.reason
    assert [node.meta["val"].dim(), node.args[0].meta["val"].dim()] == [4, 4]


def test_a_second_run_rewrites_nothing() -> None:
    _, _, result = lower(SPELLINGS["additive mask"])
    before = str(result.gm.graph)
    again = LowerAttention()(result.gm)
    assert (again.rewrites, again.skips, str(again.gm.graph)) == (0, (), before)


def test_every_attention_of_a_deep_model_is_lowered() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Attention(SPELLINGS[s]) for s in ("division", "windows", "where"))).eval()
    x = torch.randn(3, TOKENS, HEADS * CHANNELS)
    result = LowerAttention()(capture(model, x[:2]))
    assert (result.rewrites, result.skips) == (3, ())
    assert_same(model, result.gm, x)


def test_the_new_nodes_point_at_the_model() -> None:
    _, _, result = lower(opt)
    [(node, _)] = kernels(result.gm)
    assert "self.proj(self.core(self, q, k, v)" in source_line(node)


def test_scale_is_given_and_a_scaled_query_left_alone() -> None:
    for spelling, scale in (
        ("scale before", 1.0),
        ("scale after", 0.3),
        ("two scales, mask between", 0.25),
        ("negative scale", 1.0),
    ):
        [(node, _)] = kernels(lower(SPELLINGS[spelling])[2].gm)
        assert node.kwargs["scale"] == pytest.approx(scale), spelling


def test_dropout_in_training_becomes_dropout_p() -> None:
    model, x = make(lambda m, q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.25, m.training) @ v)
    result = LowerAttention()(capture(model.train(), x))
    [(node, choice)] = kernels(result.gm)
    assert (result.rewrites, node.args[4], choice.name) == (1, 0.25, "math")
    assert choice.reason == "dropout is on, which the CPU kernel does not have"
    torch.manual_seed(1)
    many = torch.stack([result.gm(x) for _ in range(400)]).detach()
    error = many.std(0) / 400**0.5  # of the mean
    assert ((many.mean(0) - model.eval()(x)).abs() <= 5 * error).all() and error.max() < 0.02


def test_bfloat16_with_a_float32_softmax_loses_no_accuracy() -> None:
    def core(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (q @ k.mT / math.sqrt(CHANNELS)).masked_fill(~m.causal, torch.finfo(q.dtype).min)
        return F.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    model, x = make(core)
    exact = copy.deepcopy(model).double()(x.double())
    model, x = model.bfloat16(), x.bfloat16()
    result = LowerAttention()(capture(model, x))
    assert (result.rewrites, result.skips) == (1, ())
    got, hand = ((y.double() - exact).abs().mean() for y in (result.gm(x), model(x)))
    assert got <= 1.1 * hand


@given(data=st.data())
@settings(deadline=None)
def test_any_mixture_of_spellings_and_shapes(data: st.DataObject) -> None:
    def pick(*choices: str) -> str:
        return data.draw(st.sampled_from(choices))

    heads, tokens, channels, keys = (data.draw(st.integers(1, 5)) for _ in range(4))
    product, second = pick("matmul", "einsum", "bmm", "baddbmm"), pick("matmul", "einsum")
    scale, when = data.draw(st.sampled_from([0.125, 1.0, 3.0])), pick("query", "mul", "div", "late")
    mask, wrap = pick("none", "add", "fill", "where", "both"), pick("none", "float32", "dropout", "clone")
    keys = min(keys, tokens)

    def core(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = q.shape
        k, v = k[:, :, :keys], v[:, :, :keys]
        if when == "query":
            q = q * scale
        if product in ("bmm", "baddbmm"):
            q, k, v = (t.reshape(-1, t.shape[2], t.shape[3]) for t in (q, k, v))
        bias = m.bias[..., :keys] if q.dim() == 4 else m.bias[0, :, :keys]
        if product == "einsum":
            logits = torch.einsum("...nd,...md->...nm", q, k)
        elif product == "baddbmm":
            logits = torch.baddbmm(bias, q, k.mT, alpha=0.7)
        else:
            logits = torch.bmm(q, k.mT) if product == "bmm" else q @ k.mT
        logits = logits * scale if when == "mul" else logits / scale if when == "div" else logits
        if mask in ("add", "both"):
            logits = logits + bias
        if mask in ("fill", "both"):
            logits = logits.masked_fill(~m.causal[:, :keys], -INF)
        if mask == "where":
            logits = torch.where(m.causal[:, :keys], logits, -1e9)
        if when == "late":
            logits = logits * scale
        weights = logits.softmax(-1, dtype=torch.float32 if wrap == "float32" else None)
        if wrap == "dropout":
            weights = F.dropout(weights, 0.5, m.training)
        if wrap == "clone":
            weights = weights.clone()
        out = weights @ v if second == "matmul" else torch.einsum("...nm,...md->...nd", weights, v)
        return out.reshape(shape)

    model, x, result = lower(core, heads=heads, tokens=tokens, channels=channels)
    assert (result.rewrites, result.skips) == (1, ())
    assert_same(model, result.gm, x)


@pytest.mark.inductor
def test_inductor_compiles_hand_written_attention_to_flash() -> None:
    from torch._inductor.utils import run_and_get_code

    model, x, result = lower(opt)
    with torch.no_grad():
        got, code = run_and_get_code(torch.compile(result.gm), x)
        torch.testing.assert_close(got, model(x), atol=1e-5, rtol=0)
    assert any("_scaled_dot_product_flash_attention_for_cpu" in text for text in code)
    assert SDPA in {node.target for node in result.gm.graph.nodes}
