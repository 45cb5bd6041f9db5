"""`python -m bench fidelity-macs`: each method's best at a budget, on pictures that nothing was chosen on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.__main__ import main
from bench.tables import equal_macs


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(6):  # three crops of each
        Image.fromarray(random.integers(0, 256, (80, 120, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    model = ["fidelity-macs", "--model", "test_vit", "--img-size", "64", "--images", str(folder)]
    return [*model, "--shares", "0.8", "--methods", "stream", "ToMe"]


class Asked(Exception):
    """Holds what the search was asked for."""


def test_what_is_asked_of_the_search(options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def search(model: Any, images: Any, **asked: Any) -> None:
        raise Asked(len(images), asked)

    monkeypatch.setattr(equal_macs, "search", search)
    with pytest.raises(Asked) as caught:
        main([*options, "--every", "--resume", str(tmp_path)])
    searched, asked = caught.value.args
    assert searched == len(asked["held_out"]) == 9 and asked["macs"] == 0.8 and asked["methods"] == ["stream", "ToMe"]
    assert asked["every"] and asked["resume"] == tmp_path / "0.8 of dense.jsonl"


@pytest.mark.slow
def test_a_small_model(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    assert main([*options, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert all(
        f"| {name} " in out
        for name in ("stream", "prune: random", "ToMe as published, best ramp", "the search's choice")
    )
    [found] = json.loads(file.read_text())
    assert {row["method"] for row in found["rows"]} == {"stream", "ToMe", "prune: random"}
    assert all(row["macs"] <= 0.8 * found["macs_dense"] for row in found["rows"])
