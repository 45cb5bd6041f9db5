"""Attention written by hand, on small sizes, and what lowering makes of it: for the tests of `LowerAttention`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from passes.attention.lower_attention import LowerAttention
from passes.graph.base import PassResult
from passes.graph.ops import aten_name

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
