"""Table 6: its rows, and the paper's figures beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench.tables import table6


def test_quick_measures_every_row_and_notes_its_memory_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    given = ["table6", "--quick", "--models", "ResNet-34", "--batch-size", "1", "--json", str(file)]
    assert bench.main(given) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["method"] for row in rows] == ["base", "line-wise", "token-wise"]
    assert rows[0]["gflops"] > rows[1]["gflops"] == rows[2]["gflops"]
    assert rows[0]["speedup"] == 1
    for row in rows:
        assert set(row["rounds_seconds"]) == set(table6.FORMATS) and row["memory_format"] in table6.FORMATS
    out = capsys.readouterr().out
    assert "numbers that mean nothing" in out and "5811" not in out


def test_the_papers_figures_stand_beside_ours() -> None:
    subject = table6.resnet("ResNet-50", quick=False)
    base = {"method": "base", "gflops": 4.112}
    line = {
        "method": "line-wise", "gflops": 2.721, "throughput": 50.0, "memory_format": "channels_last", "speedup": 1.3,
        "speedup_quartiles": [1.2, 1.4],
    }  # fmt: skip
    lines = table6.text([(subject, base), (subject, line)]).splitlines()
    assert lines[0].split("  ")[0] == "model" and "top-1" not in lines[0]
    assert " ".join(lines[-1].split()) == (
        "ResNet-50 line-wise 2.721 2.7 50 channels_last 1.30x [1.20, 1.40] 3553 (1.21x) 76.4"
    )
