"""`python -m bench runtimes`: its rows in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rs_compile
from bench.__main__ import main
from bench.runtimes import QUICK, built, cut


@pytest.mark.parametrize("precisions", [("fp32",), pytest.param(("fp32", "int8"), marks=pytest.mark.slow)])
def test_a_row_a_runtime_precision_and_batch(
    precisions: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "r.json"
    asked = ("--quick", "--rounds", "1", "--models", "DeiT-S", "--runtimes", "onnxruntime", "--batch-size", "1", "3")
    asked = (*asked, "--precisions", ",".join(precisions))
    assert main(["runtimes", *asked, "--json", str(target)]) == 0
    rows = json.loads(target.read_text())["rows"]
    assert [(row["runtime"], row["precision"], row["batch"]) for row in rows] == [
        ("onnxruntime", precision, batch) for precision in precisions for batch in (1, 3)
    ]
    assert all(row["MACs"] > 1.2 and row["of MACs"] == pytest.approx(row["speed-up"] / row["MACs"]) for row in rows)
    assert "of MACs" in capsys.readouterr().out
    assert main(["runtimes", *asked, "--json", str(target)]) == 0  # nothing is measured again
    assert json.loads(target.read_text())["rows"] == rows


@torch.no_grad()
def test_the_cut_model_has_as_many_tokens() -> None:
    """The first ones, cut by hand; the model that is given stays whole."""
    model, images = built("DeiT-S", quick=True), torch.randn(2, 3, 112, 112)
    report = rs_compile.plan(model, QUICK, images)
    tokens = model.pos_drop(model._pos_embed(model.patch_embed(images)))
    for row, block in zip(report.blocks, model.blocks, strict=True):
        tokens = block(tokens)[:, : row.tokens_out]
    assert tokens.shape[1] < 30 < model.forward_features(images).shape[1]
    torch.testing.assert_close(cut(model, report)(images), model.forward_head(model.norm(tokens)))
