"""Heads mixed between the softmax and the product with the values: re-attention (DeepViT), talking heads (CaiT).

Each kept key has its weight, whatever the heads make of it, so the layer runs as it is on the tokens left.
"""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from torch import Tensor, nn

import rs_compile
from passes.graph.base import Refusal

C, HEADS, N = 16, 4, 12
KEEP = {0: 0.6, 1: 0.6}
Mix = Callable[["Attention", Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.mix, self.qkv, self.out = mix, nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.weights = nn.Parameter(torch.randn(HEADS, HEADS))
        self.linear, self.norm = nn.Linear(HEADS, HEADS), nn.LayerNorm(HEADS)
        self.conv, self.batch_norm = nn.Conv2d(HEADS, HEADS, 1), nn.BatchNorm2d(HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        weights = self.mix(self, (q @ k.mT / 2).softmax(-1))
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(C), nn.LayerNorm(C), Attention(mix)
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Net(nn.Module):
    def __init__(self, mix: Mix) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.cls = nn.Linear(8, C), nn.Parameter(torch.randn(1, 1, C))
        self.layers = nn.Sequential(*(Layer(mix) for _ in range(3)))
        self.eval().double()
        oracle.shake(self, 0.3)

    def embed(self, x: Tensor) -> Tensor:
        return torch.cat([self.cls.expand(x.shape[0], -1, -1), self.patch(x)], 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(self.embed(x))
        return out


def batch_first_heads_last(a: Attention, w: Tensor) -> Tensor:
    return (w.permute(0, 2, 3, 1) @ a.weights).permute(0, 3, 1, 2)


MIXES: dict[str, Mix] = {
    "re-attention, einsum and norm": lambda a, w: a.norm(
        torch.einsum("bhij,hg->bgij", w, a.weights).permute(0, 2, 3, 1)
    ).permute(0, 3, 1, 2),
    "re-attention, convolution and batch norm": lambda a, w: a.batch_norm(a.conv(w)) * 3,
    "einsum, table first": lambda a, w: torch.einsum("gh,bhij->bgij", a.weights, w),
    "matmul": batch_first_heads_last,
    "matmul, table first": lambda a, w: (a.weights @ w.permute(0, 2, 1, 3)).permute(0, 2, 1, 3),
    "linear": lambda a, w: a.linear(w.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "summed one by one": lambda a, w: (w.unsqueeze(1) * a.weights[:, :, None, None]).sum(2),
}


def by_hand(net: Net, x: Tensor) -> Tensor:
    """The model's own layers on one sample after another, on the tokens that are left."""
    found = []
    for full in net.embed(x):
        full, left = full.clone(), torch.arange(len(full))
        for i, layer in enumerate(net.layers):
            assert isinstance(layer, Layer)
            now = full[left]
            middle = now + layer.attn(layer.norm1(now[None]))[0]
            branch = layer.mlp(layer.norm2(middle))
            full[left] = middle + branch
            if i in KEEP:
                score = (branch - middle).norm(dim=-1)
                score[0] = torch.inf
                left = left[score.topk(oracle.keep_count(len(left), KEEP[i])).indices.sort().values]
        found.append(full)
    return torch.stack(found)


def images() -> Tensor:
    return torch.randn(2, N, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@torch.no_grad()
def test_heads_mixed_behind_the_softmax(mix: Mix) -> None:
    net, x = Net(mix), images()
    found, wanted = rs_compile.optimize(net, KEEP, backend="eager")(x), by_hand(net, x)
    assert (found - wanted).abs().max() < 1e-12
    assert (wanted - net(x)).abs().max() > 1e-3


WINDOWS: dict[str, tuple[Mix, str]] = {
    "a convolution over queries and keys": (
        lambda a, w: nn.functional.conv2d(w, w.new_ones(HEADS, HEADS, 3, 3), padding=1),
        "a convolution, which needs the tokens on their full grid",
    ),
    "weights of other tokens": (
        lambda a, w: torch.einsum("bhij,bhkj->bhik", w, w),
        "with weights that no softmax over tokens has normalised",
    ),
}


@pytest.mark.parametrize(("mix", "words"), WINDOWS.values(), ids=WINDOWS)
def test_what_is_no_mix_of_heads(mix: Mix, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        rs_compile.optimize(Net(mix), KEEP, backend="eager")(images())
