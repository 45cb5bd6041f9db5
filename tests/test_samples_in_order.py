"""Ops that let samples change places, join or meet: each sample keeps tokens of its own, so these need all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rs_compile

Samples = Callable[[Tensor, Tensor], Tensor]
OPS: dict[str, Samples] = {  # of the stream and of what it was made from
    "joined": lambda y, t: torch.cat([y, y * 2], 0) * torch.cat([t, t * 3], 0),
    "repeated": lambda y, t: y.repeat(2, 1, 1) * t.repeat(2, 1, 1),
    "reversed": lambda y, t: y.flip(0) * t,
    "shifted": lambda y, t: y.roll(1, 0) * t,
    "each with each": lambda y, t: (y[:, None] * y).sum(1) * t,
    "apart": lambda y, t: torch.stack([a * b for a, b in itertools.combinations(y.unbind(), 2)]),
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def mlp(self, x: Tensor) -> Tensor:
        term: Tensor = self.down(F.gelu(self.up(x)))
        return term

    def attend(self, x: Tensor) -> Tensor:
        q = self.mix(x).unsqueeze(1)
        return x + F.scaled_dot_product_attention(q, q, q).squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, op: Samples) -> None:
        super().__init__()
        self.first, self.second, self.op = Layer(), Layer(), op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.second(self.first(x)), x).mean(1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPS)
@torch.no_grad()
def test_every_token_is_back_before_samples_meet(name: str) -> None:
    torch.manual_seed(0)
    model = Model(OPS[name]).double().eval()
    x = torch.randn(3, 10, 8, dtype=torch.float64)
    between = model.first.attend(x)
    term = model.first.mlp(between)
    stream = between + term
    rows = []
    for sample, score in zip(stream, (term - between).norm(dim=-1), strict=True):
        kept = sorted(score.argsort(descending=True)[:5].tolist())
        sample[kept] = model.second(sample[kept].unsqueeze(0))[0]
        rows.append(sample)
    wanted = OPS[name](torch.stack(rows), x).mean(1)
    short = rs_compile.optimize(model, {0: 0.5}, backend="eager")(x)
    torch.testing.assert_close(short, wanted, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(short, model(x))
