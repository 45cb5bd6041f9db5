"""The compile-time command, and that the passes' work is linear in the number of blocks, whatever the clock says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from bench.__main__ import main
from bench.compile_time import calls_of_passes, measured
from rs_compile import Schedule

IMAGES = torch.zeros(2, 3, 64, 64)


def test_the_work_of_the_passes_is_linear_in_the_blocks() -> None:
    calls = {}
    for depth in (4, 8, 12):
        model = timm.create_model("test_vit", img_size=64, depth=depth).eval()
        calls[depth] = calls_of_passes(model, IMAGES, Schedule({0: 0.5, 2: 0.5}))
    first, second = calls[8] - calls[4], calls[12] - calls[8]
    assert 0 < first <= second < 1.05 * first


def test_the_times_are_parts_of_each_other() -> None:
    model = timm.create_model("test_vit", img_size=64, depth=2).eval()
    alone, total, passes = measured(model, IMAGES, Schedule({0: 0.5}))
    assert alone > 0 and 0 < passes < total


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "c.json"
    assert main(["compile-time", "--quick", "--parts", "memory", "--rounds", "1", "--json", str(target)]) == 0
    heads = capsys.readouterr().out.splitlines()[:2]
    assert heads[0] == "memory" and heads[1].split()[0] == "dense"
    (row,) = json.loads(target.read_text())["memory"]
    assert row["ratio"] == row["pruned MiB"] / row["dense MiB"] < 1
