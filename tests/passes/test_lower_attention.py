"""Every spelling of attention becomes one SDPA with the same numbers; what is none stays and says why."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from passes.attention_kernel import SDPA, kernels
from passes.base import PassResult, source_line
from passes.contraction import aten_name
from passes.lower_attention import LowerAttention

HEADS, TOKENS, CHANNELS = 4, 10, 8
INF = math.inf
Core = Callable[["Attention", Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Multi-head attention on [B, N, H * D] whose inside, [B, H, N, D] to [B, H, N, D], is given."""

    def __init__(self, core: Core, heads: int = HEADS, tokens: int = TOKENS, channels: int = CHANNELS) -> None:
        super().__init__()
        width = heads * channels
        self.core, self.heads = core, heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(heads, tokens, tokens))
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        self.mix = nn.Linear(heads, heads)
        self.register_buffer("causal", torch.ones(tokens, tokens, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.core(self, q, k, v).transpose(1, 2).reshape(b, n, c))


def capture(model: nn.Module, x: Tensor) -> GraphModule:
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.AUTO},), strict=False)
    return exported.module(check_guards=False)


def make(core: Core, **sizes: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Attention(core, **sizes)
    width, tokens = model.proj.in_features, model.bias.shape[-1]
    return model.eval(), torch.randn(3, tokens, width)


def lower(core: Core, **sizes: int) -> tuple[nn.Module, Tensor, PassResult]:
    model, x = make(core, **sizes)
    return model, x, LowerAttention()(capture(model, x[:2]))


def names(gm: GraphModule) -> list[str]:
    return [aten_name(node) for node in gm.graph.nodes]


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients of the input and of every parameter that takes part."""
    x = x.clone().requires_grad_()
    parameters = [p for _, p in sorted(model.named_parameters())]
    out = model(x)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    found = torch.autograd.grad((out * weights).sum(), [x, *parameters], allow_unused=True)
    return out, [torch.zeros(()) if g is None else g for g in found]


def assert_same(model: nn.Module, gm: GraphModule, x: Tensor) -> None:
    wanted, grads = run(model, x)
    got, got_grads = run(gm, x)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    for g, w in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4)


def folded(core: Core) -> Core:
    """The core on [B * H, N, D]."""

    def on_folded(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, n, d = q.shape
        return core(m, *(t.reshape(b * h, n, d) for t in (q, k, v))).view(b, h, n, d)

    return on_folded


def by_window(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Swin: a mask for each of two windows, which stand in the batch."""
    b, h, n, _ = q.shape
    q, k, v = (torch.cat([t, t.flip(2)], dim=1).reshape(b * 2, h, n, -1) for t in (q, k, v))
    mask = torch.stack([torch.zeros(n, n), torch.ones(n, n).triu(1) * -100])
    logits = (q @ k.mT + m.bias).view(b, 2, h, n, n) + mask.unsqueeze(1).unsqueeze(0)
    return (logits.view(-1, h, n, n).softmax(-1) @ v).view(b, 2, h, n, -1).sum(1)


def in_place(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.mT
    logits *= 0.3
    logits += m.bias
    return logits.softmax(-1) @ v


def heads_last(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * 0.3
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v).transpose(1, 2)


def opt(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads folded for the products, unfolded for the mask."""
    b, h, n, d = q.shape
    q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
    logits = torch.bmm(q, k.transpose(1, 2)).view(b, h, n, n) + m.bias
    return torch.bmm(logits.view(b * h, n, n).softmax(-1), v).view(b, h, n, d)


def one_key_head(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k[:, :1].mT).softmax(-1) @ v[:, :1]


def five_dims(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in (q, k, v))
    mask = m.bias[:, :5, :5]
    return ((q @ k.mT + mask).softmax(-1) @ v).transpose(1, 2).flatten(2, 3)


def strided(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Channels in front of tokens, as a 1x1 convolution leaves them; P^T instead of V^T."""
    q, k, v = (t.mT.contiguous() for t in (q, k, v))
    return (v @ (q.mT @ k).softmax(-1).transpose(-2, -1)).mT


def no_op_views(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shape = (q.shape[0], HEADS, TOKENS, TOKENS)
    return (q @ k.mT).reshape(shape).softmax(-1).expand(shape).view(shape) @ v


def from_tokens(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A relative position bias that depends on the query."""
    positions = m.bias[:1, :, :CHANNELS].expand(TOKENS, TOKENS, CHANNELS)
    return (q @ k.mT + torch.einsum("bhnd,nmd->bhnm", q, positions)).softmax(-1) @ v


def view_of_result(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A view that takes a matmul's result, but not SDPA's."""
    return ((q @ k.mT).softmax(-1) @ v).view(-1, TOKENS, CHANNELS).view(q.shape)


def baddbmm(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = m.bias[0].expand(q.shape[0], -1, -1)
    return torch.bmm(torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=0.3).softmax(-1), v)


def baddbmm_empty(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    empty = torch.empty(q.shape[0], TOKENS, TOKENS)
    return torch.bmm(torch.baddbmm(empty, q, k.mT, beta=0, alpha=0.3).softmax(-1), v)


SPELLINGS: dict[str, Core] = {
    "plain": lambda m, q, k, v: (q @ k.transpose(-2, -1)).softmax(-1) @ v,
    "scale before": lambda m, q, k, v: ((q * 0.3) @ k.mT).softmax(-1) @ v,
    "scale after": lambda m, q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v,
    "number first": lambda m, q, k, v: (0.3 * (q @ k.mT)).softmax(dim=3) @ v,
    "division": lambda m, q, k, v: F.softmax(torch.matmul(q, k.mT) / math.sqrt(CHANNELS), dim=-1) @ v,
    "negative scale": lambda m, q, k, v: (q @ k.mT * -0.3).softmax(-1) @ v,
    "two scales, mask between": lambda m, q, k, v: ((q @ k.mT * 0.5 + m.bias) / 2).softmax(-1) @ v,
    "learned temperature": lambda m, q, k, v: (q @ k.mT * m.temperature.exp()).softmax(-1) @ v,
    "divided by temperature": lambda m, q, k, v: (q @ k.mT / m.temperature + m.bias).softmax(-1) @ v,
    "bmm": folded(lambda m, q, k, v: torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)),
    "baddbmm": folded(baddbmm),
    "baddbmm on nothing": folded(baddbmm_empty),
    "folded, view after": opt,
    "einsum": lambda m, q, k, v: torch.einsum(
        "bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * 0.3).softmax(-1), v
    ),
    "einsum, heads last": heads_last,
    "einsum, keys first": lambda m, q, k, v: torch.einsum("...md,...nd->...nm", k, q).softmax(-1) @ v,
    "float32 softmax": lambda m, q, k, v: F.softmax(q @ k.mT, dim=-1, dtype=torch.float32).to(q.dtype) @ v,
    "eval dropout": lambda m, q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.3, m.training) @ v,
    "zero dropout": lambda m, q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.0, True) @ v,
    "copies": lambda m, q, k, v: (q @ k.mT).contiguous().softmax(-1).clone() @ v,
    "no-op views": no_op_views,
    "additive mask": lambda m, q, k, v: (q @ k.mT * 0.3 + m.bias).softmax(-1) @ v,
    "mask first": lambda m, q, k, v: (m.bias.unsqueeze(0) + q @ k.mT).softmax(-1) @ v,
    "mask subtracted": lambda m, q, k, v: (q @ k.mT - m.bias).softmax(-1) @ v,
    "mask with alpha": lambda m, q, k, v: torch.add(q @ k.mT, m.bias, alpha=0.5).softmax(-1) @ v,
    "masks sum up": lambda m, q, k, v: (q @ k.mT + m.bias + m.bias[:1].mT).softmax(-1) @ v,
    "mask over keys": lambda m, q, k, v: (q @ k.mT + m.bias[0, 0]).softmax(-1) @ v,
    "mask from tokens": from_tokens,
    "masked_fill -inf": lambda m, q, k, v: (q @ k.mT).masked_fill(~m.causal, -INF).softmax(-1) @ v,
    "masked_fill, then bias": lambda m, q, k, v: ((q @ k.mT).masked_fill(~m.causal, -INF) + m.bias).softmax(-1) @ v,
    "masked_fill -1e9": lambda m, q, k, v: (q @ k.mT).masked_fill(~m.causal, -1e9).softmax(-1) @ v,
    "where": lambda m, q, k, v: torch.where(m.causal, q @ k.mT + m.bias, torch.finfo(q.dtype).min).softmax(-1) @ v,
    "where, value first": lambda m, q, k, v: torch.where(~m.causal, torch.tensor(-INF), q @ k.mT * 0.3).softmax(-1) @ v,
    "in place": in_place,
    "windows": by_window,
    "one key head": one_key_head,
    "rank 5": five_dims,
    "channels first": strided,
    "view of the result": view_of_result,
}


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
    many = torch.stack([result.gm(x) for _ in range(400)]).mean(0)
    torch.testing.assert_close(many, model.eval()(x), atol=0.1, rtol=0)


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
    mask = lambda hole: lambda m, q, k, v: (q @ k.mT).masked_fill(hole, -INF).softmax(-1) @ v  # noqa: E731
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


class MapToo(Attention):
    """Gives the attention map as well."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.mT).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(b, n, c), weights


def talking(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return m.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


def talking_before(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = m.mix((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return logits.softmax(-1) @ v


def shared_logits(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.mT
    return logits.softmax(-1) @ v + logits.mean()


def gated(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * m.bias.sigmoid()) @ v


def overwritten(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * 1
    logits = q @ k.mT
    q.add_(1)
    return logits.softmax(-1) @ v + q


NEAR_MISSES: dict[str, tuple[Core, str]] = {
    "talking heads": (
        talking,
        "aten.linear.default (linear_1) stands between the softmax and the product with V",
    ),
    "talking heads on logits": (
        talking_before,
        "aten.permute.default (permute_2) stands between Q K^T and the softmax",
    ),
    "talking by einsum": (
        lambda m, q, k, v: torch.einsum("bhnm,hg->bgnm", (q @ k.mT).softmax(-1), m.mix.weight) @ v,
        "aten.einsum.default (einsum) stands between the softmax and the product with V",
    ),
    "logits used twice": (shared_logits, "the attention logits have 2 users: softmax, mean"),
    "gate": (gated, "aten.mul.Tensor (mul) stands between the softmax and the product with V"),
    "query overwritten": (overwritten, "aten.mul.Tensor (mul) is changed in place"),
    "softcap": (
        lambda m, q, k, v: (torch.tanh(q @ k.mT / 5) * 5).softmax(-1) @ v,
        "aten.tanh.default (tanh) stands between Q K^T and the softmax",
    ),
    "clamp": (
        lambda m, q, k, v: (q @ k.mT).clamp(-5, 5).softmax(-1) @ v,
        "aten.clamp.default (clamp) stands between Q K^T and the softmax",
    ),
    "dropout on logits": (
        lambda m, q, k, v: F.dropout(q @ k.mT, 0.5, True).softmax(-1) @ v,
        "aten.dropout.default (dropout) stands between Q K^T and the softmax",
    ),
    "summed over queries": (
        lambda m, q, k, v: (q @ k.mT).softmax(-1).mT @ v,
        "the softmax is not over the keys, which the product with V sums over",
    ),
    "weights for each key": (
        lambda m, q, k, v: (q @ k.mT * m.bias[:, :1]).softmax(-1) @ v,
        "weighs the logits key by key",
    ),
    "temperature on a mask": (
        lambda m, q, k, v: ((q @ k.mT + m.bias) * m.temperature).softmax(-1) @ v,
        "scales logits that are masked already",
    ),
    "weak fill": (
        lambda m, q, k, v: (q @ k.mT).masked_fill(~m.causal, -5.0).softmax(-1) @ v,
        "logits are filled with -5, which hides no key",
    ),
    "two fills": (
        lambda m, q, k, v: (q @ k.mT).masked_fill(~m.causal, -1e9).masked_fill(m.causal.mT, -1e5).softmax(-1) @ v,
        "logits are filled with -1e+09 and with -100000",
    ),
    "bias on a fill": (
        lambda m, q, k, v: ((q @ k.mT).masked_fill(~m.causal, -1e5) + m.bias).softmax(-1) @ v,
        "a mask is added to logits which were filled with -100000",
    ),
    "bias by rows and columns": (
        lambda m, q, k, v: (
            (
                ((q @ k.mT).view(-1, HEADS, 2, 5, 2, 5) + m.bias[0, :5, :5].view(5, 1, 5)).view(-1, HEADS, 10, 10)
            ).softmax(-1)
            @ v
        ),
        "aten.view.default (view_2) stands between Q K^T and the softmax",
    ),
    "half-width softmax": (
        lambda m, q, k, v: (q @ k.mT).bfloat16().softmax(-1).float() @ v,
        "rounds to torch.bfloat16",
    ),
    "wide values": (
        lambda m, q, k, v: (q.double() @ k.double().mT).softmax(-1).float() @ v,
        "query, key, value and result are of torch.float32 and torch.float64",
    ),
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_says_why(miss: str) -> None:
    core, reason = NEAR_MISSES[miss]
    model, x, result = lower(core)
    assert result.rewrites == 0
    assert [reason in skip.reason for skip in result.skips] == [True], result.skips
    assert "test_lower_attention.py" in result.skips[0].where
    if miss != "dropout on logits":
        torch.testing.assert_close(result.gm(x), model(x), atol=0, rtol=0)


def test_a_returned_attention_map_is_left_alone() -> None:
    model = MapToo(SPELLINGS["plain"]).eval()
    result = LowerAttention()(capture(model, torch.randn(2, TOKENS, HEADS * CHANNELS)))
    assert (result.rewrites, len(result.skips)) == (0, 1)
    assert result.skips[0].reason == "the attention probabilities have 2 users: matmul_1, output"


@pytest.mark.parametrize(
    "core",
    [
        lambda m, q, k, v: (q @ k.mT).softmax(-2) @ v,
        lambda m, q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v),
        lambda m, q, k, v: v * q.softmax(-1),
        SPELLINGS["plain"],
    ],
    ids=["over queries", "linear attention", "gate", "classifier"],
)
def test_other_softmaxes_are_neither_lowered_nor_reported(core: Core) -> None:
    if core is SPELLINGS["plain"]:
        core = lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v).softmax(-1)  # noqa: E731
    model, x, result = lower(core)
    assert (result.rewrites, result.skips) == (0, ())
    torch.testing.assert_close(result.gm(x), model(x), atol=0, rtol=0)


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
