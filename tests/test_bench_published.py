"""Published counts of peers: their own figures to the digit, and what the compiler makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from bench.__main__ import main
from bench.tables.published import published
from rs_compile import Schedule, plan

# G by the publication's rule, recomputed from its lists
SHEET = {
    "DeiT-T 0.6": 0.655, "DeiT-T 0.7": 0.727, "DeiT-T 0.8": 0.809, "DeiT-T 0.9": 0.902, "DeiT-T 1.0": 1.004,
    "DeiT-S 2.3": 2.327, "DeiT-S 2.5": 2.505, "DeiT-S 2.7": 2.709, "DeiT-S 2.9": 2.905, "DeiT-S 3.1": 3.108,
    "DeiT-B 8.7": 8.731, "DeiT-B 10.0": 9.986, "DeiT-B 10.4": 10.434, "DeiT-B 11.5": 11.517, "DeiT-B 12.5": 12.523,
    "MAE-B 8.7": 8.711, "MAE-B 10.0": 10.003, "MAE-B 10.4": 10.419, "MAE-B 11.5": 11.517,
    "MAE-L 31.0": 31.005, "MAE-L 34.7": 34.692, "MAE-L 38.5": 38.481, "MAE-L 42.3": 42.290, "MAE-L 46.1": 46.083,
    "MAE-H 83.7": 83.647, "MAE-H 93.2": 92.107, "MAE-H 103.4": 103.337, "MAE-H 124.5": 124.388,
}  # fmt: skip
PITOME = {"DeiT-S 0.9125": 2.86, "DeiT-S 0.925": 3.07, "MAE-L 0.925": 29.8, "MAE-H 0.95": 86.2}


def test_every_figure_to_its_digit() -> None:
    found = {name: one.macs / 1e9 for name, one in published().items()}
    assert {name: round(g, 3) for name, g in found.items() if name in SHEET} == SHEET
    digits = {"DeiT-S": 2, "MAE-L": 1, "MAE-H": 1}
    assert {name: round(found[f"PiToMe {name}"], digits[name.split()[0]]) for name in PITOME} == PITOME
    assert len(found) == len(SHEET) + len(PITOME)


@pytest.mark.parametrize("name", ["DeiT-T 0.6", "DeiT-T 1.0"])
def test_the_graph_has_the_published_tokens_and_costs_that_and_the_matching(name: str) -> None:
    one = published()[name]
    model = timm.create_model("deit_tiny_patch16_224").eval()
    report = plan(model, one.schedule, torch.empty(1, 3, 224, 224), drop_unread=False)
    assert [b.tokens_out for b in report.blocks] == [left for _, left in one.tokens]
    assert [b.tokens_in for b in report.blocks] == [n for n, _ in one.tokens]
    merged = {i: r - one.schedule.by.pruned.get(i, 0) for i, r in one.schedule.merge.items()}
    matching = sum(merged[i] * (one.tokens[i][1] - 1) * 192 for i in merged)
    a_patch = 192 * 3 * 16**2  # their rule embeds as many patches as there are tokens
    assert report.macs == one.macs - a_patch + matching


def test_zero_tprune_at_its_published_share_of_deit_s() -> None:
    """-34.7% of 4.608 G; which blocks and counts were published is not known, so these are the paper's blocks."""
    from rs_compile import ZeroTPrune

    model = timm.create_model("deit_small_patch16_224").eval()
    schedule = Schedule({0: 0.801, 3: 0.802, 6: 0.81}, score=ZeroTPrune(rounds=1))
    report = plan(model, schedule, torch.empty(1, 3, 224, 224), drop_unread=False)
    assert 1 - report.flops / report.flops_dense == pytest.approx(0.347, abs=0.0005)


def test_a_schedule_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["published", "DeiT-S 2.9", "--json", str(tmp_path / "schedule.json")]) == 0
    assert main(["published", "DeiT-S 2.9"]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "schedule.json").read_text()
    assert Schedule.of(tmp_path / "schedule.json") == published()["DeiT-S 2.9"].schedule
    assert json.loads(text)["by"]["pruned"]["1"] == 1 and json.loads(text)["merge"]["1"] == 3
    assert main(["published"]) == 0
    assert "2.905" in capsys.readouterr().out
    assert main(["published", "DeiT-S 2.8"]) == 2
    assert "no published counts 'DeiT-S 2.8'; write one of 'DeiT-T 0.6'" in capsys.readouterr().err
