"""SAM's encoder in its authors' spelling: scores viewed as rows and columns get two biases and are viewed back."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rs_compile

C, HEADS, GRID = 24, 2, (4, 6)
KEEP = {0: 0.6, 1: 0.7}


def rel_pos(q: int, k: int, table: Tensor) -> Tensor:
    """[q, k, head channels] out of a table of 2 * max(q, k) - 1 distances."""
    return table[(torch.arange(q)[:, None] - torch.arange(k)[None, :]) + (k - 1)]


class Attention(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.scale = order, (C // HEADS) ** -0.5
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * GRID[0] - 1, C // HEADS))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * GRID[1] - 1, C // HEADS))

    def forward(self, x: Tensor) -> Tensor:
        size, h, w, _ = x.shape
        qkv = self.qkv(x).reshape(size, h * w, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, size * HEADS, h * w, -1).unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = self.positions(attn, q, h, w).softmax(dim=-1)
        x = (attn @ v).view(size, HEADS, h, w, -1).permute(0, 2, 3, 1, 4).reshape(size, h, w, -1)
        out: Tensor = self.proj(x)
        return out

    def positions(self, attn: Tensor, q: Tensor, h: int, w: int) -> Tensor:
        rows = q.reshape(-1, h, w, q.shape[-1])
        rel_h = torch.einsum("bhwc,hkc->bhwk", rows, rel_pos(h, h, self.rel_pos_h))
        rel_w = torch.einsum("bhwc,wkc->bhwk", rows, rel_pos(w, w, self.rel_pos_w))
        scores = attn.view(-1, h, w, h, w)
        if self.order == "authors":
            scores = scores + rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]
        elif self.order == "biases first":
            scores = rel_w[..., None, :] + (rel_h[..., None] + scores)
        elif self.order == "rows only":
            scores = scores + rel_h[..., None]
        elif self.order == "minus":
            scores = scores - rel_h[..., None] + rel_w[..., None, :]
        return scores.view(-1, h * w, h * w) if self.order == "authors" else scores.reshape(-1, h * w, h * w)


class Layer(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(C), nn.LayerNorm(C), Attention(order)
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Encoder(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, C, 4, 4)
        self.layers = nn.Sequential(*(Layer(order) for _ in range(3)))
        self.eval().double()
        oracle.shake(self, 0.3)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.layers(self.patch(images).permute(0, 2, 3, 1))
        return out


def attend(attn: Attention, x: Tensor, at: Tensor) -> Tensor:
    """Attention among the tokens [K, C] that lie `at` some cells, by a loop over queries and keys' distances."""
    q, k, v = attn.qkv(x).reshape(len(x), 3, HEADS, -1).unbind(1)
    row, column = at // GRID[1], at % GRID[1]
    down, across = (c[:, None] - c[None] + size - 1 for c, size in zip((row, column), GRID, strict=True))
    scores = torch.einsum("qhc,khc->hqk", q, k) * attn.scale
    rows = torch.einsum("qhc,qkc->hqk", q, attn.rel_pos_h[down])
    columns = torch.einsum("qhc,qkc->hqk", q, attn.rel_pos_w[across])
    signs = {"rows only": (1, 0), "minus": (-1, 1)}.get(attn.order, (1, 1))
    scores = scores + signs[0] * rows + signs[1] * columns
    out: Tensor = attn.proj(torch.einsum("hqk,khc->qhc", scores.softmax(-1), v).flatten(1))
    return out


def by_hand(model: Encoder, images: Tensor) -> Tensor:
    found = []
    for full in model.patch(images).permute(0, 2, 3, 1).flatten(1, 2):
        full, left = full.clone(), torch.arange(full.shape[0])
        for i, layer in enumerate(model.layers):
            assert isinstance(layer, Layer)
            x = full[left]
            x = x + attend(layer.attn, layer.norm1(x), left)
            branch = layer.mlp(layer.norm2(x))
            full[left] = x + branch
            if i in KEEP:
                count = oracle.keep_count(len(left), KEEP[i])
                left = left[(branch - x).norm(dim=-1).topk(count).indices.sort().values]
        found.append(full.unflatten(0, GRID))
    return torch.stack(found)


@pytest.mark.parametrize("order", ["authors", "biases first", "rows only", "minus"])
@torch.no_grad()
def test_biases_on_a_view_of_the_scores(order: str) -> None:
    model = Encoder(order)
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)).double()
    fast = rs_compile.optimize(model, KEEP, backend="eager")
    found, wanted = fast(images), by_hand(model, images)
    assert (found - wanted).abs().max() < 1e-12
    assert (wanted - model(images)).abs().max() > 1e-3
    assert F.mse_loss(rs_compile.optimize(model, {0: 1.0}, backend="eager")(images), model(images)) == 0
