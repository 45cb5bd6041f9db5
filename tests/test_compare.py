"""`fast.compare`: drift of every output against the model's own, by hand, and both times."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import rs_compile


class Two(nn.Module):
    """Two blocks, features and a map of tokens."""

    num_classes = 5

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def tokens(self, x: Tensor) -> Tensor:
        for mlp in self.blocks:
            x = x + x.softmax(1).mean(1, keepdim=True)
            x = x + mlp(x)
        return x


class Features(Two):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.tokens(x)
        return {"pooled": x.mean(1), "last": x}


class Logits(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x).mean(1))


class Counts(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x).mean(1).argmax(-1)


def sample(batch: int = 4) -> Tensor:
    return torch.randn(batch, 9, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_each_output_by_hand() -> None:
    model, x = Features().eval(), sample()
    fast = rs_compile.optimize(model, {0: 0.5}, backend="eager")
    result, found, wanted = fast.compare(x, rounds=2), fast(x), model(x)
    assert [row.output for row in result.outputs] == ["pooled", "last"]
    for row in result.outputs:
        a, b = found[row.output].flatten(0, -2), wanted[row.output].flatten(0, -2)
        each = (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).view(4, -1).mean(1)
        assert row.drift == pytest.approx(each.mean().item(), abs=1e-6) and row.drift > 0
        assert row.worst == pytest.approx(each.max().item(), abs=1e-6)
        assert row.error == pytest.approx(each.std().item() / 2, abs=1e-6)
    assert result.samples == 4 and result.divergence is None and result.macs_ratio > 1
    seconds = json.loads(result.to_json())["seconds"]
    assert len(seconds) == 2 and all(len(rounds) == 2 for rounds in seconds.values())
    assert "worst sample" in str(result) and "fewer multiply-accumulates" in str(result)


@torch.no_grad()
def test_logits() -> None:
    model, x = Logits().eval(), sample()
    fast = rs_compile.optimize(model, {0: 0.2}, backend="eager")
    result = fast.compare(x, rounds=1)
    p, q = model(x).softmax(-1), fast(x).softmax(-1)
    assert result.divergence == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), abs=1e-6)
    assert result.agreement == (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    assert "the same best class" in str(result)


def test_the_same_model_is_no_step_away() -> None:
    fast = rs_compile.optimize(Features().eval(), {0: 1.0}, backend="eager")
    assert all(abs(row.worst) < 1e-9 for row in fast.compare(sample(1), rounds=1).outputs)


def test_nothing_to_compare() -> None:
    fast = rs_compile.optimize(Counts().eval(), {0: 0.5}, backend="eager")
    with pytest.raises(rs_compile.CompileError, match=r"returns no tensor of floats .* compare its outputs by hand"):
        fast.compare(sample())
