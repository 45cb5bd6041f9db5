"""Encoders in front of a decoder of their own width (Segmenter, MAE): tokens come back between the two."""

from __future__ import annotations

import pytest
import torch
from oracle import randomise
from torch import Tensor, nn

import rs_compile


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.fc1(self.norm2(x)).relu())
        return y

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x)
        return x + self.mlp(x)


class Segmenter(nn.Module):
    """[B, 3, 32, 32] -> [B, 16, classes]: a score of each class for each patch."""

    def __init__(self, queries: bool, dim: int = 12, classes: int = 5) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 8, 8)
        self.encoder = nn.ModuleList(Block(dim) for _ in range(3))
        self.norm, self.between = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.decoder = nn.ModuleList(Block(dim) for _ in range(2))
        self.queries = nn.Parameter(torch.randn(1, classes, dim)) if queries else None
        self.head = nn.Linear(dim, classes)

    def decode(self, x: Tensor) -> Tensor:
        count, x = x.shape[1], self.between(self.norm(x))
        if self.queries is not None:
            x = torch.cat([x, self.queries.expand(len(x), -1, -1)], 1)
        for block in self.decoder:
            x = block(x)
        if self.queries is not None:
            return x[:, :count] @ x[:, count:].transpose(1, 2)
        scores: Tensor = self.head(x)
        return scores

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        for block in self.encoder:
            x = block(x)
        return self.decode(x)


def by_hand(model: Segmenter, image: Tensor, at: int, keep: int) -> Tensor:
    """Tokens leave after an encoder's block and stand in front of the decoder with the value that they left with."""
    x = model.patches(image).flatten(2).transpose(1, 2)
    kept, whole = None, x
    for i, block in enumerate(model.encoder):
        assert isinstance(block, Block)
        x = block.attend(x)
        shift = (block.mlp(x) - x).norm(dim=2)
        x = x + block.mlp(x)
        if i == at:
            whole, kept = x, shift.topk(keep, dim=1).indices.sort(1).values.unsqueeze(2).expand(-1, -1, x.shape[2])
            x = x.gather(1, kept)
    assert kept is not None
    return model.decode(whole.scatter(1, kept, x))


@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("at", [0, 1])
def test_tokens_come_back_in_front_of_the_decoder(queries: bool, at: int) -> None:
    torch.manual_seed(0)
    model = Segmenter(queries).eval().double()
    randomise(model)
    image = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    fast = rs_compile.optimize(model, {at: 0.7}, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(image), by_hand(model, image, at, 12), rtol=1e-9, atol=1e-9)
    left = [row.tokens_out for row in fast.report().blocks]
    assert left[at] == 12 and left[2] == 16


def test_no_layer_of_the_encoder_would_gain() -> None:
    """Behind the encoder's last block the decoder needs every token at once."""
    answer = rs_compile.explain(Segmenter(queries=True).eval(), torch.randn(3, 3, 32, 32))
    assert [row.prunable for row in answer.rows] == [True, True, False, True, True]
    with pytest.raises(rs_compile.Refusal, match="no layer lies between"):
        rs_compile.optimize(Segmenter(queries=True).eval(), {2: 0.7}, backend="eager")(torch.randn(3, 3, 32, 32))
