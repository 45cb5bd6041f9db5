"""What is no attention stays as it is, and says why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attentions import (
    CHANNELS,
    HEADS,
    SPELLINGS,
    TOKENS,
    Attention,
    Core,
    capture,
    lower,
    make,
)
from torch import Tensor

from passes.attention.lower_attention import LowerAttention


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
    "weight by rows and columns": (
        lambda m, q, k, v: (
            (
                ((q @ k.mT).view(-1, HEADS, 2, 5, 2, 5) * m.bias[0, :5, :5].view(5, 1, 5)).view(-1, HEADS, 10, 10)
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
    assert "attentions.py" in result.skips[0].where
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
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v).softmax(-1),
    ],
    ids=["over queries", "linear attention", "gate", "classifier"],
)
def test_other_softmaxes_are_neither_lowered_nor_reported(core: Core) -> None:
    model, x, result = lower(core)
    assert (result.rewrites, result.skips) == (0, ())
    torch.testing.assert_close(result.gm(x), model(x), atol=0, rtol=0)


def test_a_look_at_sizes_leaves_the_batch_a_symbol() -> None:
    """Three samples of two heads are six, as many as there are tokens."""

    def folded(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        return ((q @ k.mT).abs().softmax(-1) @ v).unflatten(0, (-1, 2))

    model, x = make(folded, heads=2, tokens=6)
    gm = capture(model, x)
    LowerAttention()(gm)
    symbols = next(n for n in gm.graph.nodes if n.op == "placeholder").meta["val"].shape[0]
    assert not symbols.node.expr.is_Integer
