"""Encoders that regroup their tokens: soft split (T2T), divided space-time attention, masks of a fixed count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

import rs_compile
from passes.graph.base import Refusal

C = 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (C // 2) ** -0.5).softmax(-1)
        out: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(x.shape))
        return out


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn, self.mlp = nn.LayerNorm(C), nn.LayerNorm(C), Attention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class TokenTransformer(nn.Module):
    """T2T's: its skip starts at the values, so that channels may change."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(channels), nn.LayerNorm(C), mlp()
        self.qkv, self.proj = nn.Linear(channels, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, 1, C).permute(2, 0, 3, 1, 4)
        weights = (q * C**-0.5 @ k.transpose(-2, -1)).softmax(-1)
        x = v.squeeze(1) + self.proj((weights @ v).transpose(1, 2).reshape(*x.shape[:2], C))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Made(nn.Module):
    def made(self) -> Any:
        self.eval().double()
        oracle.shake(self, 0.3)
        return self


class T2T(Made):
    """[B, 3, 32, 32]: 8 x 8 tokens, then 4 x 4, then a class token in front."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.split = nn.ModuleList([nn.Unfold(7, stride=4, padding=2), nn.Unfold(3, stride=2, padding=1)])
        self.first, self.project = TokenTransformer(147), nn.Linear(9 * C, C)
        self.cls, self.positions = nn.Parameter(torch.zeros(1, 1, C)), nn.Parameter(torch.zeros(1, 17, C))
        self.layers = nn.Sequential(Layer(), Layer(), Layer())

    def embed(self, images: Tensor) -> Tensor:
        x = self.first(self.split[0](images).transpose(1, 2))
        side = int(x.shape[1] ** 0.5)
        x = self.split[1](x.transpose(1, 2).reshape(x.shape[0], C, side, side)).transpose(1, 2)
        return torch.cat((self.cls.expand(x.shape[0], -1, -1), self.project(x)), 1) + self.positions

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.layers(self.embed(images))
        return out


class Masked(Made):
    """VideoMAE's encoder: the visible tokens alone, as many in each sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.positions = nn.Linear(12, C), nn.Parameter(torch.zeros(1, 16, C))
        self.layers = nn.Sequential(Layer(), Layer(), Layer())

    def embed(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.patch(x) + self.positions
        return x[~mask].reshape(x.shape[0], -1, C)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.layers(self.embed(x, mask))
        return out


class MaskedAlike(Masked):
    """One mask for all samples."""

    def embed(self, x: Tensor, mask: Tensor) -> Tensor:
        return (self.patch(x) + self.positions)[:, ~mask[0]]


class Divided(nn.Module):
    """TimeSformer's layer: over time for each place, then over space for each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(3))
        self.over_time, self.over_space, self.join, self.mlp = Attention(), Attention(), nn.Linear(C, C), mlp()

    def forward(self, x: Tensor, size: int, t: int, w: int) -> Tensor:
        cls, patches = x[:, :1], x[:, 1:]
        h = patches.shape[1] // t // w
        time = self.over_time(self.norms[0](patches.reshape(size, h, w, t, C).reshape(-1, t, C)))
        patches = patches + self.join(time.reshape(size, h * w * t, C))
        frames = patches.reshape(size, h, w, t, C).permute(0, 3, 1, 2, 4).reshape(size * t, h * w, C)
        first = cls.repeat(1, t, 1).reshape(size * t, C).unsqueeze(1)
        space = self.over_space(self.norms[1](torch.cat((first, frames), 1)))
        mean = space[:, 0].reshape(size, t, C).mean(1, True)
        rest = space[:, 1:].reshape(size, t, h, w, C).permute(0, 2, 3, 1, 4).reshape(size, h * w * t, C)
        x = torch.cat((cls, patches), 1) + torch.cat((mean, rest), 1)
        out: Tensor = x + self.mlp(self.norms[2](x))
        return out


class TimeSformer(Made):
    """[B, 3, T, 16, 16]"""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.cls = nn.Conv2d(3, C, 4, 4), nn.Parameter(torch.zeros(1, 1, C))
        self.positions, self.times = nn.Parameter(torch.zeros(1, 17, C)), nn.Parameter(torch.zeros(1, 3, C))
        self.layers, self.head = nn.ModuleList(Divided() for _ in range(3)), nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        size, t, side = x.shape[0], x.shape[2], x.shape[4] // 4
        x = self.patch(x.permute(0, 2, 1, 3, 4).flatten(0, 1)).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1) + self.positions
        cls, n = x[:size, 0].unsqueeze(1), x.shape[1] - 1
        x = x[:, 1:].reshape(size, t, n, C).permute(0, 2, 1, 3).reshape(size * n, t, C) + self.times
        x = torch.cat((cls, x.reshape(size, n * t, C)), 1)
        for layer in self.layers:
            x = layer(x, size, t, side)
        out: Tensor = self.head(x[:, 0])
        return out


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_hand(stream: Tensor, layers: nn.Module, keep: Mapping[int, float], prefix: int) -> Tensor:
    """The model's own layers on one sample after another, on the tokens that are left."""
    found = []
    for full in stream:
        full, left = full.clone(), torch.arange(len(full))
        for i, layer in enumerate(layers.children()):
            assert isinstance(layer, Layer)
            now = full[left]
            middle = now + layer.attn(layer.norm1(now[None]))[0]
            branch = layer.mlp(layer.norm2(middle))
            full[left] = middle + branch
            if i in keep:
                score = (branch - middle).norm(dim=-1)
                score[:prefix] = torch.inf
                left = left[score.topk(oracle.keep_count(len(left), keep[i])).indices.sort().values]
        found.append(full)
    return torch.stack(found)


@torch.no_grad()
def test_layers_behind_soft_split() -> None:
    model, images = T2T().made(), noise(2, 3, 32, 32)
    found = rs_compile.optimize(model, {1: 0.6, 2: 0.6}, backend="eager")(images)  # block 0 is the token transformer's
    wanted = by_hand(model.embed(images), model.layers, {0: 0.6, 1: 0.6}, 1)
    assert (found - wanted).abs().max() < 1e-12 and (wanted - model(images)).abs().max() > 1e-3


def test_tokens_cannot_leave_before_soft_split() -> None:
    with pytest.raises(Refusal, match="cuts the tokens' grid into windows, or joins them, and needs every token"):
        rs_compile.optimize(T2T().made(), {0: 0.6}, backend="eager")(noise(2, 3, 32, 32))


@pytest.mark.parametrize("kind", [Masked, MaskedAlike])
@torch.no_grad()
def test_visible_tokens_of_a_mask_that_is_always_the_same(kind: type[Masked]) -> None:
    model, x = kind().made(), noise(2, 16, 12)
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(1)).argsort(1) < 6
    with pytest.raises(Refusal, match="how many tokens there are depends on the data") as caught:
        rs_compile.optimize(model, {0: 0.6}, backend="eager")(x, mask)
    assert "way out: where a mask among the inputs picks them and is always the same" in str(caught.value)
    keep = {0: 0.6, 1: 0.6}
    found = rs_compile.optimize(model, keep, backend="eager", constant_inputs=["mask"])(x, mask)
    wanted = by_hand(model.embed(x, mask), model.layers, keep, 0)
    assert (found - wanted).abs().max() < 1e-12 and (wanted - model(x, mask)).abs().max() > 1e-3


@torch.no_grad()
def test_divided_space_time_attention() -> None:
    """Each layer folds places and frames by themselves, so tokens may leave only behind the last."""
    model, x = TimeSformer().made(), noise(2, 3, 3, 16, 16)
    with pytest.raises(Refusal, match=r"reshapes \[batch, tokens\(48\), 16\] to .* splits the token axis"):
        rs_compile.optimize(model, {0: 0.6}, backend="eager")(x)
    fast = rs_compile.optimize(model, {2: 0.5}, backend="eager")
    assert (fast(x) - model(x)).abs().max() < 1e-12
    assert fast.report().blocks[2].tokens_out == 25  # the class token, and 24 of 48
