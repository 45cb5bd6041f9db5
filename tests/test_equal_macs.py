"""`python -m bench fidelity-macs`: each method's best at a budget, on pictures that nothing was chosen on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.__main__ import main


def test_a_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(6):  # three crops of each
        Image.fromarray(random.integers(0, 256, (80, 120, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    file = tmp_path / "found.json"
    options = ["--model", "test_vit", "--img-size", "64", "--images", str(folder), "--shares", "0.8"]
    assert main(["fidelity-macs", *options, "--methods", "stream", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "| stream " in out and "| random" in out and "| the search's choice" in out
    [found] = json.loads(file.read_text())
    assert {row["method"] for row in found["rows"]} == {"stream", "random"}
    assert all(row["macs"] <= 0.8 * found["macs_dense"] for row in found["rows"])
