"""`python -m bench table3 | fidelity | figure6`: rows and words, on small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.__main__ import main
from bench.tables import table3
from bench.tables.fidelity import WAYS
from bench.tables.subjects import UMT
from rs_compile import plan


def rows_of(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return found


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    return folder


@pytest.mark.slow
def test_table3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    options = ["--quick", "--columns", "gflops", "--models", "UMT-B", "--datasets", "MSRVTT,QA", "--json", str(file)]
    assert main(["table3", *options]) == 0
    gflops = {(row["method"], row.get("dataset")): row["gflops"] for row in rows_of(file)}
    dense = gflops["base", None]
    merged = {key: g for key, g in gflops.items() if key[1] is not None}
    assert len(merged) == 2 * len(table3.MERGING) and all(g < dense for g in merged.values())
    # the shift of the MLP is known behind it, so the MLP still sees the tokens that merge
    assert merged["vid-tldr", "MSRVTT"] < merged["vid-tldr-shift", "MSRVTT"]
    text = capsys.readouterr().out
    assert "vid-TLDR with shift" in text and "1.36x" not in text  # the paper's figure is of the real model


@pytest.mark.slow
@pytest.mark.parametrize("model", UMT)
def test_gflops_of_the_published_counts(model: str) -> None:
    printed = {
        "UMT-B": (178.0, 181.3, 227.6, 212.8, 206.2, 212.9, 203.7, 188.5),
        "UMT-L": (543.4, 528.6, 563.1, 559.0, 583.7, 610.9, 615.7, 569.8),
    }[model]
    subject = table3.umt_encoder(model, (), 1, {}, False, qa=False)
    network, sample = subject.on_meta()
    for dataset, wanted in zip(table3.COUNTS, printed, strict=True):
        method = table3.merging("vid-tldr", table3._counts(subject, dataset, quick=False))
        assert method.schedule is not None
        assert round(plan(network, method.schedule, sample, drop_unread=False).flops / 1e9, 1) == wanted, dataset


def test_fidelity(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plot = tmp_path / "rows.json", tmp_path / "drift.png"
    options = ["--model", "test_vit", "--img-size", "64", "--images", str(pictures), "--counts", "0:4,1:2"]
    chosen = [
        str(list(WAYS).index(way) + 1) for way in ("prune: MLP shift", "ToMe", "stream, size bias", "Ward, size bias")
    ]
    options += ["--ways", ",".join(chosen), "--json", str(file), "--out", str(plot)]
    assert main(["fidelity", *options]) == 0
    first, rows = capsys.readouterr(), rows_of(file)
    assert [row["method"] for row in rows] == ["prune: MLP shift", "ToMe", "stream, size bias", "Ward, size bias"]
    assert all((row["pictures"], row["crops"]) == (1, 3) and -1 <= row["cosine"] < 1 for row in rows)
    assert len({row["cosine"] for row in rows}) == 4
    assert all(row["gmacs"] < row["gmacs_dense"] for row in rows)
    assert "to the dense model's, 1 pictures, 3 crops of each" in first.out and "3 pictures" not in first.out
    assert "weights: none" in first.out and plot.stat().st_size > 10_000
    assert main(["fidelity", *options]) == 0
    again = capsys.readouterr()
    assert again.out == first.out and "ToMe" in first.err and "ToMe" not in again.err  # measured once


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--counts", "0:400"], "--counts: block 0 has"),
        (["--images", "/nowhere"], "--images /nowhere is no folder"),
        (["--weights"], "unrecognized arguments"),
    ],
)
def test_fidelity_refuses(options: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["fidelity", "--model", "test_vit", "--img-size", "64", "--quick", "--ways", "1", *options]
    try:
        assert main(argv) == 2
    except SystemExit as end:
        assert end.code == 2
    assert text in capsys.readouterr().err


def test_figure6(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, scores = tmp_path / "maps.png", tmp_path / "scores.json"
    options = ["--model", "test_vit", "--layers", "0,1", "-o", str(out), "--json", str(scores)]
    assert main(["figure6", str(pictures / "noise.png"), *options]) == 0
    text = capsys.readouterr().out
    assert "random weights" in text and out.stat().st_size > 10_000
    assert [layer["index"] for layer in json.loads(scores.read_text())["layers"]] == [0, 1]
