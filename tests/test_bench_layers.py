"""Drift by score and block: the table of figures 3 and 5 without labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.tables.layers import SCORES


def test_the_digits_by_every_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    options = ["--digits", "--limit", "6", "--blocks", "1", "--draws", "2", "--json", str(file), "--leave", "0.8"]
    assert main(["layers", *options]) == 0
    first, rows = capsys.readouterr(), json.loads(file.read_text())["rows"]
    assert [row["score"] for row in rows] == list(SCORES)
    assert all(len(row["drift"]) == 6 and min(row["drift"]) >= 0 and row["leave"] == 80 for row in rows)
    assert len({tuple(row["drift"]) for row in rows}) == len(SCORES)  # each chose in its own way
    best = min(rows, key=lambda row: sum(row["drift"]))["score"]
    (line,) = (line for line in first.out.splitlines() if "**" in line and line.startswith("|"))
    assert line.split("|")[1].strip() == best
    assert "80 of 101 tokens leave" in first.out and "(figure 5b): on average at" in first.out
    assert main(["layers", *options]) == 0
    again = capsys.readouterr()
    assert again.out == first.out and "block 1" in first.err and "block 1" not in again.err  # measured once


def test_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "--digits", "--leave", "1.5"]) == 2
    assert "--leave 1.5: write a share between 0 and 1" in capsys.readouterr().err
