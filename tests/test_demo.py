"""The demo: its pictures and weights, the table against pruning by hand, the page and the picture."""

from __future__ import annotations

import io
import json
from importlib.resources import files as resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import oracle
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from bench.demo_data import PHOTOGRAPHS, source
from rs_compile.cli import main
from rs_compile.demo import run as demo_run
from rs_compile.demo.model import load_pretrained_demo_vit
from rs_compile.demo.page import page
from rs_compile.demo.pictures import Labelled, compose, demo_pictures
from rs_compile.demo.result import CompiledSpeed, Demo, Row
from rs_compile.demo.run import BLOCKS, MERGED, METHODS, merged, pruned
from rs_compile.timing import Spread

DATA = resources("rs_compile").joinpath("data")
QUICK = 48  # pictures


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_pretrained_demo_vit()


@pytest.fixture(scope="module")
def pictures() -> Labelled:
    return demo_pictures()


def test_the_pictures_are_the_same_on_every_call(pictures: Labelled) -> None:
    torch.manual_seed(7)
    again = demo_pictures(20)
    assert pictures.inputs.shape == (596, 3, 56, 56) and pictures.labels.bincount().tolist() == [
        59, 60, 59, 61, 60, 60, 60, 59, 58, 60,
    ]  # fmt: skip
    assert torch.equal(again.inputs, pictures.inputs[:20]) and torch.equal(again.labels, pictures.labels[:20])
    assert pictures.inputs.min() >= -1 and pictures.inputs.max() <= 1


def test_a_digit_is_somewhere_else_in_each_and_covers_a_small_part() -> None:
    scans, grey = torch.full((64, 8, 8), 16, dtype=torch.uint8), torch.full((60, 60, 3), 40, dtype=torch.uint8)
    found = compose(scans, [grey], torch.Generator().manual_seed(0), strokes=0)
    ink = (found - 40 / 255).abs().amax(1) > 0.2  # whole scans of ink, the photograph plain
    share = ink.double().mean((1, 2))
    assert share.min() > 0.15 and share.max() < 0.35
    middle = torch.arange(56.0)
    centres = torch.stack([(i.double() @ middle.double()).sum() / i.sum() for i in ink])
    assert centres.std() > 5
    # light ink on a dark photograph
    assert bool((found.amax((1, 2, 3)) > 0.45).all())


def test_strokes_are_few_and_thin() -> None:
    scans, grey = torch.zeros(64, 8, 8, dtype=torch.uint8), torch.full((60, 60, 3), 40, dtype=torch.uint8)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    without, strokes = (compose(scans, [grey], g, strokes=n) for g, n in zip(generators, (0, 3), strict=True))
    drawn = ((strokes - without).abs().amax(1) > 0.1).double().mean((1, 2))
    assert drawn.min() > 0.01 and drawn.max() < 0.15


def test_nothing_of_the_test_set_was_trained_on() -> None:
    train, test = source("train"), source("test")
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["test"])
    both = torch.cat([train.scans, test.scans]).flatten(1)
    assert len(both.unique(dim=0)) == 1797 == len(both)
    shipped = safetensors.torch.load(DATA.joinpath("demo_pictures.safetensors").read_bytes())
    assert torch.equal(shipped["scans"], test.scans) and torch.equal(shipped["labels"].long(), test.labels)
    assert {f"photograph.{name}" for name in test.photographs} | {"scans", "labels"} == shipped.keys()


def test_the_files_are_small() -> None:
    assert len(DATA.joinpath("demo_vit.safetensors").read_bytes()) < 3_000_000
    assert len(DATA.joinpath("demo_pictures.safetensors").read_bytes()) < 500_000


@torch.no_grad()
def test_accuracy_of_the_weights(model: nn.Module, pictures: Labelled) -> None:
    named = torch.cat([model(part).argmax(1) for part in pictures.inputs.split(100)])
    assert (named == pictures.labels).double().mean() >= 0.95  # 95.5% measured


def test_every_method_leaves_as_many_tokens() -> None:
    counts = [197]
    for _ in BLOCKS:
        counts.append(oracle.keep_count(counts[-1], 0.7))
    left = [before - after for before, after in pairwise(counts)]
    assert merged(0.7, 197).merge == {block + 1: n for block, n in zip(BLOCKS, left, strict=True)}
    assert merged(0.3, 197).merge == {1: 98, 2: 39, 3: 29, 4: 13, 5: 8}  # one of two; the rest in the next block
    assert all(make(0.7, 197).keep == pruned(0.7).keep for name, make in METHODS.items() if name != MERGED)


@torch.no_grad()
def test_the_table_against_pruning_by_hand(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: nn.Module,
    pictures: Labelled,
) -> None:
    monkeypatch.setattr(demo_run, "QUICK_PICTURES", QUICK)
    monkeypatch.setattr(demo_run, "BATCH", QUICK // 2)
    target, html, png = (tmp_path / name for name in ("d.json", "d.html", "d.png"))
    command = [
        "demo",
        "--quick",
        "--backend",
        "eager",
        "--json",
        str(target),
        "--html",
        str(html),
        "--picture",
        str(png),
    ]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == ["accuracy", "speed", "drawing"]  # no line a stage in a log
    lines, content = out.splitlines(), json.loads(target.read_text())
    assert lines[0].startswith(f"accuracy in % on {QUICK} photographs with a digit somewhere, by what chose")
    assert lines[3].split()[:2] == ["dense", "197"] and lines[-1].startswith("of 1 budgets shift is more accurate")
    assert lines[6].startswith("speed-up over the dense model, both uncompiled") and content["compiled"] is None
    assert row_speeds(content) == {"shift", "class attention", "Ward merging"}
    (row,) = content["rows"]
    inputs, labels = pictures.inputs[:QUICK], pictures.labels[:QUICK]
    for name, lowest in (("shift", False), ("lowest shift", True)):
        wanted = oracle.timm_vit(model, inputs, oracle.Pruning(pruned(0.7).keep, protected=1, lowest=lowest))
        share = (wanted.outputs["output"].argmax(1) == labels).double().mean().item()
        assert row["accuracy"][name] == [pytest.approx(share)]
    assert content["accuracy"] == pytest.approx((model(inputs).argmax(1) == labels).double().mean().item())
    assert len(row["accuracy"]["random"]) == 5
    assert all(cost < content["gflops"] for cost in row["gflops"].values())
    # the same tokens leave, but for what chooses them
    assert max(row["gflops"].values()) < 1.1 * min(row["gflops"].values())
    assert ">197 &gt; 138 &gt; 97 &gt; 68</td>" in html.read_text()
    with Image.open(png) as drawn:
        assert drawn.width > 700 and drawn.height > 400


def row_speeds(content: dict[str, Any]) -> set[str]:
    """Which methods were timed; each in numbers above zero."""
    (row,) = content["rows"]
    assert all(0 < speed["quartile_low"] <= speed["quartile_high"] for speed in row["speed_up"].values())
    return set(row["speed_up"])


def row_of(shift: float, attention: float, random: float) -> Row:
    accuracy = {"shift": (shift,), "class attention": (attention,), "random": (random - 0.01, random + 0.01)}
    return Row(0.5, (5,), dict.fromkeys(accuracy, 0.5), accuracy, {"shift": Spread(1.5, 1.4, 1.6)})


def demo_of(*rows: Row) -> Demo:
    return Demo(400, (0,), 0.96, 9, 1.0, 0.25, 64, 2, 9, rows, CompiledSpeed(0.5, 0.2, Spread(1.7, 1.6, 1.8)))


def test_random_is_drawn_anew_for_each_seed() -> None:
    class Guesses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.rand(len(x), 10)

    first, again = (demo_run._accuracies(Guesses(), torch.zeros(200, 1), torch.zeros(200), 5) for _ in range(2))
    assert len(set(first)) > 1 and first == again


def test_the_verdict_counts_wins_and_no_ties() -> None:
    text = demo_of(row_of(0.9, 0.9, 0.8), row_of(0.7, 0.6, 0.75), row_of(0.5, 0.6, 0.7)).verdict()
    assert "of 3 budgets shift is more accurate than class attention in 1, than random in 1 (random:" in text
    assert "a picture is 0.25 points, the standard error of the dense accuracy 1.0" in text


def test_the_page_has_the_table_and_nothing_from_elsewhere() -> None:
    demo = demo_of(row_of(0.9, 0.8, 0.7))
    drawn = io.BytesIO()
    Image.new("RGB", (4, 4)).save(drawn, "png")
    text = page(demo, drawn.getvalue())
    for title, (heads, rows) in demo.tables():
        cells = [cell for line in (heads, *rows) for cell in line if ">" not in cell]
        assert f"<h2>{title}</h2>" in text and all(f">{cell}</t" in text for cell in cells)
    assert "9 &gt; 5" in text and "shift at keep 0.5 1.70x [1.60, 1.80] over torch.compile(model), 200 ms" in text
    assert json.loads(demo.to_json())["compiled"]["speed_up"]["median"] == 1.7
    assert "http:" not in text and "https:" not in text and 'src="data:image/png;base64,iVBOR' in text


def test_files_that_cannot_be_written_are_said_before_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for option, file in (("--html", "d.pdf"), ("--picture", "d.jpg"), ("--html", "no/d.html")):
        assert main(["demo", option, str(tmp_path / file)]) == 2
        assert f"{option} {tmp_path / file}: write a ." in capsys.readouterr().err
    monkeypatch.setattr("rs_compile.demo.command.find_spec", lambda _: None)
    assert main(["demo", "--html", str(tmp_path / "d.html")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
