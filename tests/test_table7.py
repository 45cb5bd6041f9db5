"""Table 7 on models small enough to wait for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import randomise
from PIL import Image

from bench import table7
from bench.digits import load_digits
from bench.models.digits_vim import load_pretrained_digits_vim
from bench.models.vim import VisionMamba
from passes.graph.base import CompileError
from rs_compile import Schedule


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    table7.add_arguments(parser)
    return parser.parse_args(given)


@torch.no_grad()
def test_the_digits_model_is_good_enough_to_be_pruned() -> None:
    images, labels = load_digits("test")
    right = load_pretrained_digits_vim()(images[:200]).argmax(1) == labels[:200]
    assert right.double().mean() > 0.97


def demo_pictures(tmp_path: Path) -> None:
    """The base agrees with itself, every method is scored, and a broken file is named."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = torch.randint(0, 256, (230, 240, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / name / f"{i}.png")
    (tmp_path / "b" / "broken.png").write_bytes(b"no picture")
    model: Any = randomise(VisionMamba(patch=56, classes=2, dim=16, depth=2)).eval()
    args = arguments("--imagenet", str(tmp_path), "--backend", "eager", "--workers", "0", "--batch-size", "3")
    schedule = Schedule({0: 0.5})
    rows: dict[str, table7.Row] = {name: {} for name in (table7.BASE, *table7.methods(schedule))}
    skipped = table7.imagenet(rows, model, schedule, args)
    assert [s.file for s in skipped] == ["b/broken.png"]
    assert all(row["images"] == 6 and 0 <= row["top1"] <= 100 for row in rows.values())
    assert rows[table7.BASE]["agreement"] == 100


def test_printed() -> None:
    row = {"gflops": 1.5251, "tokens": [197], "digits": 99.5, "digits_images": 596}
    speed = {"throughput": 3.0, "speedup": {"median": 1.17, "quartile_low": 1.16, "quartile_high": 1.18}}
    rows = {"base": row, "ours": row | speed | {"gflops": 1.3074, "tokens": [197, 157, 125]}}
    text = table7.table(rows, arguments("--backend", "eager"))
    (ours,) = (line.split() for line in text.splitlines() if line.startswith("ours"))
    assert " ".join(ours) == "ours 197 -> 157 -> 125 1.307 1.3 3.00 1.17x [1.16, 1.18] 75.5 99.5"
    assert "ToP-ViM's code trains 30 epochs" in text and "compare with 71.1" in text
    quick = table7.table(rows, arguments("--backend", "eager", "--quick"))
    assert "75.5" not in quick and "its numbers mean nothing" in quick
    assert quick.startswith("stand-in for ViM-T") and "1.17x" not in quick and "img/s" not in quick


def test_pictures_need_weights() -> None:
    with pytest.raises(CompileError, match="--imagenet needs ViM-T and its weights: pass --checkpoint FILE"):
        table7.run(arguments("--imagenet", "folder"))


@pytest.mark.slow
def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table7.run(arguments("--quick", "--json", str(tmp_path / "rows.json"), "--rounds", "1")) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert list(rows) == ["base", "ToP-ViM", "ToP-ViM, its code", "ours", "ours, decay"]
    assert rows["ours"]["tokens"] == [37, 29, 23] and rows["ours"]["gflops"] < rows["base"]["gflops"]
    assert all(row["digits"] > 80 and len(row["rounds_seconds"]) == 1 for row in rows.values())
    assert "ToP-ViM" in capsys.readouterr().out
