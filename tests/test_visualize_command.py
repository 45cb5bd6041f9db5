"""`rs-compile visualize`: what it draws, what it tells, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import rs_compile
from rs_compile.cli import main
from rs_compile.models import build, load_images
from rs_compile.visualize.command import layers_for, parse_layers, seen
from rs_compile.visualize.picture import PANEL


def test_layers_are_read_from_text() -> None:
    assert parse_layers("1,5, 9,1") == [1, 5, 9] and parse_layers("all") is None
    for text in ("1;2", "-1", "", "1,,2", "²"):
        with pytest.raises(rs_compile.CompileError, match="is no block; write indices counted from 0"):
            parse_layers(text)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    torch.manual_seed(1)
    torch.save(build("test_vit", img_size=64).state_dict(), tmp_path / "w.pth")
    noise = np.random.RandomState(0).randint(0, 255, (80, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png"), str(tmp_path / "w.pth")


def command(files: tuple[str, str], output: Path, *more: str) -> list[str]:
    image, weights = files
    model = ("--model", "test_vit", "--img-size", "64", "--checkpoint", weights)
    return ["visualize", image, *model, "--layers", "1,3", "-o", str(output), *more]


def test_seen_undoes_the_transform(files: tuple[str, str]) -> None:
    model = build("test_vit", img_size=64)
    images = load_images([Path(files[0])], model, 64)
    with Image.open(files[0]) as image:
        # test_vit: the shorter side to 64 / 0.95 = 67, then the middle 64 x 64
        resized = image.resize((75, 67), Image.Resampling.BICUBIC)
        wanted = np.asarray(resized.crop((6, 2, 70, 66)))
    assert abs(seen(images, model)[0] * 255 - wanted).max() < 0.01


def test_a_disk_that_is_full(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rs_compile.visualize.command.save_picture", full)
    assert main(command(files, tmp_path / "o.png")) == 2
    assert "No space left on device; nothing was drawn [RSC-801]" in capsys.readouterr().err


def test_the_command_draws_and_tells(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, numbers = tmp_path / "o.PNG", tmp_path / "o.json"
    assert main(command(files, output, "--schedule", "0:0.5", "--metric", "l1", "--json", str(numbers))) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "MLP shift, l1: lowest" in lines[0]
    assert lines[2].split()[:2] == [files[0], "1"] and lines[3].split()[:2] == [files[0], "3"]
    assert lines[4] == "after block 0: 9 of 17 tokens are left" and lines[-1] == f"written: {output}"
    assert "fewer multiply-accumulates" in lines[-2] and "worst sample" in lines[5]
    assert "scoring" in err and f"drawing {output}" in err
    with Image.open(output) as picture:
        assert picture.format == "PNG" and picture.width > 3 * PANEL
    content = json.loads(numbers.read_text())
    assert content["size"] == [64, 64] and [la["index"] for la in content["layers"]] == [1, 3]
    shift = np.array(content["layers"][1]["shift"])
    assert shift.shape == (1, 4, 4) and lines[3].split()[2] == f"{shift.min():.4g}"
    assert np.array(content["sites"][0]["kept"]).sum() == 8
    assert (np.array(content["sites"][0]["stands"]) >= 0).sum() == 8
    assert content["beside"]["samples"] == 1 and content["beside"]["macs_ratio"] > 1


def test_the_layers_that_are_drawn_where_none_are_named() -> None:
    schedule = rs_compile.Schedule({6: 0.8}, merge={0: 3})
    assert layers_for(Path("o.html"), schedule) == "all" and layers_for(Path("o.png"), schedule) == "0,6"
    assert layers_for(Path("o.png"), rs_compile.Schedule()) == "1,5,9"


def test_the_options_of_the_score_hold_for_the_schedule(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def record(*_: Any, **options: Any) -> Any:
        asked.append(options)
        raise rs_compile.CompileError("enough")

    monkeypatch.setattr("rs_compile.visualize.command.score_maps", record)
    in_json = '{"keep": {"0": 0.5}, "score": {"kind": "shift", "of": "attention", "with_skip": true}}'
    for more in (["--schedule", "0:0.5", "--of", "attention", "--with-skip"], ["--schedule", in_json]):
        assert main(command(files, tmp_path / "o.html", *more)) == 2
    wanted = rs_compile.Schedule({0: 0.5}, score=rs_compile.Shift(of="attention", with_skip=True))
    for options in asked:
        assert options["schedule"] == wanted
        assert options["shift"] == wanted.score
    assert len(asked) == 2


def test_errors_of_the_command(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*argv: str) -> str:
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err
        return err

    assert "a picture ends in .png, a page in .html" in error(*command(files, tmp_path / "o.gif"))
    assert "give one in a directory that exists" in error(*command(files, tmp_path / "no" / "o.png"))
    unread = command((files[1], files[1]), tmp_path / "o.png")
    assert "cannot be read as an image" in error(*unread)
    late = command(files, tmp_path / "o.png", "--layers", "1,5,9")
    assert "layer 9 does not exist: the model has 6 blocks, counted from 0 to 5; name" in error(*late)
    assert "is no block" in error(*command(files, tmp_path / "o.png", "--layers", "x"))
    assert not (tmp_path / "o.png").exists()
