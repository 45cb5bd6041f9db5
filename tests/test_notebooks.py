"""The notebooks run from top to bottom, offline, uncompiled, and say what their text says."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rs_compile import optimize

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = ["custom_model", "dinov2_features", "video"]


def code(name: str) -> list[str]:
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def executed(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that its cells leave; a cell's last expression counts for nothing, as when it is run as a script."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("RS_CHECKPOINT", raising=False)
    monkeypatch.setitem(optimize.__kwdefaults__, "backend", "eager")
    left: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code(name)):
        exec(compile(cell, f"{name}, code cell {number}", "exec"), left)
    return left


def test_all_are_here_and_without_outputs() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NOTEBOOKS
    for name in NOTEBOOKS:
        cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
        assert [c for c in cells if c["cell_type"] == "code" and (c["outputs"] or c["execution_count"])] == []
        assert f"{name}.ipynb" in (FOLDER / "index.md").read_text()
        for cell in code(name):
            ast.parse(cell)


@pytest.mark.slow
def test_custom_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    left = executed("custom_model", monkeypatch)
    printed = capsys.readouterr().out
    assert "cumsum" in printed and "[RSC-403]" in printed and "\nTrue\n" in printed
    assert left["loss"].item() < 2.3 and left["logits"].shape == (8, 10)


@pytest.mark.slow
def test_dinov2_features(monkeypatch: pytest.MonkeyPatch) -> None:
    left = executed("dinov2_features", monkeypatch)
    assert left["merged"].shape == left["dense"].shape == (12, 384)
    assert not torch.equal(left["merged"], left["dense"]) and left["both"][1].shape == (3, 256, 384)


@pytest.mark.slow
def test_video(monkeypatch: pytest.MonkeyPatch) -> None:
    left = executed("video", monkeypatch)
    assert left["length"] == 196 and left["tokens"].shape[1] == 101
    assert left["share"].mean().item() == pytest.approx(101 / 196)
