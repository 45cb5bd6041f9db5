"""`python -m bench runtimes`: its rows in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.__main__ import main


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
