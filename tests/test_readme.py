"""The README's example of an op of one's own does what the text says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from passes.axes.rules import registry
from rs_compile import Refusal, optimize

README = Path(__file__).parents[1] / "README.md"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def branch(self, x: Tensor) -> Tensor:
        mean: Tensor = torch.ops.mine.running_mean(self.up(x))
        return self.down(mean.relu())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branch(x)
        return (x + self.branch(x)).mean(1)


@torch.no_grad()
def test_a_rule_for_an_op_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TOKEN_RULES", dict(registry.TOKEN_RULES))
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "register_token_rule" in c)
    exec(code, {})
    model, x = Model(), torch.randn(3, 6, 8)
    optimized = optimize(model, {0: 0.5}, backend="eager")
    wanted = []
    for sample in x.split(1):
        y = sample + model.branch(sample)
        kept = (model.branch(sample) - sample).norm(dim=-1)[0].topk(3).indices.sort().values
        wanted.append((y[:, kept] + model.branch(y[:, kept])).mean(1))
    torch.testing.assert_close(optimized(x), torch.cat(wanted))
    linears, mean = 2 * 8 * 16, 16
    assert optimized.report().macs == (linears + mean) * 6 + (linears + mean) * 3
    registry.TOKEN_RULES.pop(torch.ops.mine.running_mean.default)
    with pytest.raises(Refusal, match="no rule says what this op does to a shorter sequence of tokens"):
        optimize(model, {0: 0.5}, backend="eager")(x)
