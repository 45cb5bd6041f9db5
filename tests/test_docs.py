"""Every Python block of README and docs runs, and the example of an op of one's own does what the text says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mktestdocs import check_md_file
from torch import Tensor, nn

from rs_compile import Refusal, optimize
from rs_compile.rules import scoped

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
RULES = ROOT / "docs" / "rules.md"


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in (ROOT / p).read_text() and ROOT / p != RULES])
@torch.no_grad()
def test_every_block_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, with random weights: no hub can be reached here."""
    create, asked = timm.create_model, []

    def without_hub(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        asked.append(name)
        return create(name, depth=12, embed_dim=24, num_heads=2, **options)

    monkeypatch.setattr(timm, "create_model", without_hub)
    monkeypatch.setitem(optimize.__kwdefaults__, "backend", "eager")
    with scoped():
        check_md_file(ROOT / page, memory=True)
    assert asked or "create_model" not in (ROOT / page).read_text()


def test_links_lead_somewhere() -> None:
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())]
    assert len(links) > 8
    assert [(page, link) for page, link in links if not ((ROOT / page).parent / link).exists()] == []


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
def test_a_rule_for_an_op_of_your_own() -> None:
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", RULES.read_text(), re.S) if "register_token_rule" in c)
    model, x = Model(), torch.randn(3, 6, 8)
    optimized = optimize(model, {0: 0.5}, backend="eager")
    with scoped():
        exec(code, {})
        found, report = optimized(x), optimized.report()
    wanted = []
    for sample in x.split(1):
        y = sample + model.branch(sample)
        kept = (model.branch(sample) - sample).norm(dim=-1)[0].topk(3).indices.sort().values
        wanted.append((y[:, kept] + model.branch(y[:, kept])).mean(1))
    torch.testing.assert_close(found, torch.cat(wanted))
    linears, mean = 2 * 8 * 16, 16
    assert report.macs == (linears + mean) * 6 + (linears + mean) * 3
    with pytest.raises(Refusal, match="no rule says what this op does to a shorter sequence of tokens"):
        optimize(model, {0: 0.5}, backend="eager")(x)
