"""An MLP that makes the queries and keys of an attention layer is a part of it, and no block (DAB-DETR's encoder)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import sample, table
from torch import Tensor, nn

import rs_compile
from passes.network.branches import find_blocks, find_branches
from passes.pipeline import prepare

WIDTH = 8


class Scaled(nn.Module):
    """A layer that adds positions, scaled by an MLP of its input, to what its queries and keys are made of.

    Args:
        past: its values are made of the input itself, and so is the residual sum.
    """

    def __init__(self, past: bool = True) -> None:
        super().__init__()
        self.past = past
        self.scale = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        y = x + at * self.scale(x)
        stream = x if self.past else y
        values = stream[:, None]
        keys = y[:, None]
        x = self.norm1(stream + F.scaled_dot_product_attention(keys, keys, values)[:, 0])
        return self.norm2(x + self.mlp(x))


class Encoder(nn.Module):
    """Such layers on x [B, 6, 8] with a table of positions [6, 8]."""

    def __init__(self, past: bool = True, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.at = nn.Parameter(table(6, WIDTH))
        self.layers = nn.ModuleList(Scaled(past) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.at)
        return x


def test_the_scale_is_a_part_of_the_attention() -> None:
    gm = prepare(Encoder().eval(), (sample(),), {}, lower=True).gm
    assert [b.kind for b in find_branches(gm)] == ["attention", "mlp"] * 3
    blocks = find_blocks(gm)
    assert [b.where for b in blocks] == [f"layers.{i}" for i in range(3)]
    assert all(b.attention is not None and b.entry is b.attention.stream for b in blocks)


def test_a_sum_that_everything_goes_through_is_a_layer() -> None:
    gm = prepare(Encoder(past=False).eval(), (sample(),), {}, lower=True).gm
    assert [b.kind for b in find_branches(gm)] == ["mlp", "attention", "mlp"] * 3


@torch.no_grad()
@pytest.mark.parametrize("sites", [{0: 4}, {0: 5, 1: 3}])
def test_tokens_leave_queries_keys_and_values_alike(sites: dict[int, int]) -> None:
    model, x = Encoder().eval().double(), sample().double()
    shares = {i: (k - 0.5) / before for (i, k), before in zip(sites.items(), [6, *sites.values()], strict=False)}
    found = rs_compile.optimize(model, shares, backend="eager")(x)
    for b in range(len(x)):
        whole, at = x[b].clone(), torch.arange(6)
        last = whole.clone()
        for i, layer in enumerate(model.layers):
            y = whole[at]
            keys = y + model.at[at] * layer.scale(y)
            weights = (keys @ keys.T / WIDTH**0.5).softmax(-1)
            y = layer.norm1(y + weights @ y)
            branch = layer.mlp(y)
            last[at] = y + branch
            if i in sites:
                at = at[(branch - y).norm(dim=-1).topk(sites[i]).indices.sort().values]
            whole = layer.norm2(last)
        torch.testing.assert_close(found[b], whole)
    assert (found - model(x)).abs().max() > 1e-3
