"""Accuracy on folders of real picture files: scores against a naive oracle, bad files, interruption, resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from bench.evaluate.images import ImageScores, evaluate_images, find_pictures
from bench.evaluate.journal import EvaluationError
from bench.evaluate.sweep import Skipped, skipped_text, spread

CLASSES = 7
SIDE = 8
TRANSFORM = create_transform((3, SIDE, SIDE), crop_pct=1.0)


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Seven class folders, three pictures each, PNG and JPEG."""
    folder = tmp_path / "val"
    for label in range(CLASSES):
        for i in range(3):
            picture(folder / f"n{label:04}" / f"{i}.{('png', 'JPEG', 'jpg')[i]}", 10 * label + i)
    return folder


class Linear:
    """Logits by a fixed random matrix; remembers the batches, and stops in the middle if told to."""

    def __init__(self, seed: int, stop_at: int | None = None) -> None:
        self.weight = torch.randn(CLASSES, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(seed))
        self.batches: list[int] = []
        self.stop_at = stop_at

    def __call__(self, x: Tensor) -> Tensor:
        if len(self.batches) == self.stop_at:
            raise KeyboardInterrupt
        self.batches.append(len(x))
        return x.flatten(1) @ self.weight.T


def run(folder: Path, **options: Any) -> dict[str, ImageScores]:
    models = options.pop("models", None) or {"dense": Linear(0), "pruned": Linear(1)}
    settings = {"classes": CLASSES, "batch_size": 4, "workers": 0, **options}
    return evaluate_images(models, "dense", folder, TRANSFORM, **settings)


def by_hand(
    model: Callable[[Tensor], Tensor], dense: Callable[[Tensor], Tensor], files: list[Path]
) -> dict[str, float]:
    """The five numbers, one picture after the other, in plain arithmetic; the label is in the folder's name."""
    total = dict.fromkeys(("top1", "top5", "agreement", "cosine", "kl"), 0.0)
    for file in files:
        pixels = TRANSFORM(Image.open(file).convert("RGB")).unsqueeze(0)
        a, b = model(pixels)[0].tolist(), dense(pixels)[0].tolist()
        ranked = sorted(range(len(a)), key=lambda c: -a[c])
        total["agreement"] += ranked[0] == max(range(len(b)), key=lambda c: b[c])
        if file.parent.name.startswith("n"):
            label = int(file.parent.name[1:])
            total["top1"] += ranked[0] == label
            total["top5"] += label in ranked[:5]
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        total["cosine"] += dot / math.sqrt(sum(p * p for p in a)) / math.sqrt(sum(q * q for q in b))
        p, q = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (b, a))
        total["kl"] += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    percent = ("top1", "top5", "agreement")
    return {k: (100 if k in percent else 1) * v / len(files) for k, v in total.items()}


def test_scores_are_those_of_one_picture_at_a_time(labelled: Path) -> None:
    models = {"dense": Linear(0), "pruned": Linear(1)}
    scores = run(labelled, models=models)
    assert models["dense"].batches == models["pruned"].batches == [4, 4, 4, 4, 4, 1]
    for name, found in scores.items():
        wanted = by_hand(models[name], models["dense"], sorted(labelled.rglob("*.*")))
        for key, value in wanted.items():
            assert getattr(found, key) == pytest.approx(value, rel=1e-4, abs=1e-6), (name, key)
        assert (found.images, found.skipped) == (21, ())
    assert (scores["dense"].agreement, scores["dense"].kl) == (100, pytest.approx(0, abs=1e-12))
    assert scores["pruned"].kl > 0.1 and scores["pruned"].agreement < 100


def test_a_model_that_knows_the_classes(labelled: Path) -> None:
    files = sorted(labelled.rglob("*.*"))
    known = {TRANSFORM(Image.open(f).convert("RGB")).sum().item(): int(f.parent.name[1:]) for f in files}

    def oracle(x: Tensor) -> Tensor:
        return torch.stack([torch.eye(CLASSES)[known[row.sum().item()]] for row in x])

    def second_guess(x: Tensor) -> Tensor:
        return oracle(x) + 2 * torch.eye(CLASSES)[oracle(x).argmax(1).sub(1)]

    scores = run(labelled, models={"dense": oracle, "pruned": second_guess})
    assert (scores["dense"].top1, scores["dense"].top5) == (100, 100)
    assert (scores["pruned"].top1, scores["pruned"].top5, scores["pruned"].agreement) == (0, 100, 0)
    assert scores["pruned"].cosine == pytest.approx(1 / math.sqrt(5))


def test_equal_logits_go_by_index(labelled: Path) -> None:
    scores = run(labelled, models={"dense": lambda x: torch.zeros(len(x), CLASSES) + 1})
    assert scores["dense"].top1 == pytest.approx(100 / 7)  # the pictures of class 0
    assert scores["dense"].top5 == pytest.approx(500 / 7)


def test_pictures_without_labels(tmp_path: Path) -> None:
    for i in range(5):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "notes.txt").write_text("no picture")
    scores = run(tmp_path)
    wanted = by_hand(Linear(1), Linear(0), sorted(tmp_path.glob("*.png")))
    assert (scores["pruned"].top1, scores["pruned"].top5, scores["pruned"].images) == (None, None, 5)
    for key in ("agreement", "cosine", "kl"):
        assert getattr(scores["pruned"], key) == pytest.approx(wanted[key], rel=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_left_out_and_named(labelled: Path, workers: int) -> None:
    whole = run(labelled)
    (labelled / "n0001" / "broken.png").write_bytes(b"no picture at all")
    cut = (labelled / "n0002" / "1.JPEG").read_bytes()
    (labelled / "n0003" / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    scores = run(labelled, workers=workers)
    skipped = scores["dense"].skipped
    assert [s.file for s in skipped] == ["n0001/broken.png", "n0003/cut.jpg"]
    assert "cannot identify image file" in skipped[0].reason and "Truncated" in skipped[1].reason
    assert scores["pruned"].images == 21
    for key in ("top1", "top5", "agreement", "cosine", "kl"):  # as if they were not there
        assert getattr(scores["pruned"], key) == pytest.approx(getattr(whole["pruned"], key))


def test_what_is_said_of_skipped_files() -> None:
    assert skipped_text([]) == ""
    two = skipped_text([Skipped("a.png", "cut"), Skipped("b/c.png", "no picture")])
    assert two == "left out, as they could not be read: 2\n  a.png: cut\n  b/c.png: no picture"


def test_no_picture_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(EvaluationError, match=r"none of the 1 pictures in .* could be read; the first, a\.png: "):
        run(tmp_path)


def test_classes_that_do_not_match(labelled: Path) -> None:
    with pytest.raises(EvaluationError, match="has 7 class folders, the model 1000 classes"):
        run(labelled, classes=1000)


def test_folders_that_cannot_be_meant(tmp_path: Path, labelled: Path) -> None:
    with pytest.raises(EvaluationError, match=r"there is no folder .*nowhere"):
        run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match=r"there are no pictures in .*empty"):
        run(tmp_path / "empty")
    picture(labelled / "loose.png", 0)
    with pytest.raises(EvaluationError, match=r"both class folders \(n0000, ...\) and loose pictures \(loose.png"):
        run(labelled)


def test_class_folders_in_natural_order_and_below(tmp_path: Path) -> None:
    for label in (10, 2, 0):
        picture(tmp_path / str(label) / "deeper" / "a.png", label)
    (tmp_path / "3").mkdir()  # empty, still a class
    (tmp_path / ".cache").mkdir()
    found = find_pictures(tmp_path)
    assert found.files == ("0/deeper/a.png", "2/deeper/a.png", "10/deeper/a.png")
    assert (found.labels, found.classes) == ((0, 1, 3), 4)


def test_a_limit_takes_pictures_of_many_classes(labelled: Path) -> None:
    assert find_pictures(labelled, 7).labels == tuple(range(7))
    assert run(labelled, limit=7)["dense"].images == 7
    assert spread(10, 4) == [0, 2, 5, 7] and spread(3, 5) == [0, 1, 2]


@pytest.mark.parametrize("batches", [0, 1, 4])
def test_an_interrupted_evaluation_goes_on(labelled: Path, tmp_path: Path, batches: int) -> None:
    (labelled / "n0000" / "broken.png").write_bytes(b"no picture")  # in a batch before the interruption
    file = tmp_path / "resume.json"
    whole = run(labelled)
    with pytest.raises(KeyboardInterrupt):
        run(labelled, models={"dense": Linear(0), "pruned": Linear(1, stop_at=batches)}, resume=file)
    assert len(file.read_text().splitlines()) == 1 + batches
    models = {"dense": Linear(0), "pruned": Linear(1)}
    assert run(labelled, models=models, resume=file) == whole
    assert len(models["dense"].batches) == 6 - batches
    again = {"dense": Linear(0), "pruned": Linear(1)}
    assert run(labelled, models=again, resume=file) == whole
    assert again["dense"].batches == []


def test_a_torn_line_does_not_count(labelled: Path, tmp_path: Path) -> None:
    file = tmp_path / "resume.json"
    whole = run(labelled, resume=file)
    file.write_text(file.read_text()[:-20])
    models = {"dense": Linear(0), "pruned": Linear(1)}
    assert run(labelled, models=models, resume=file) == whole
    assert models["dense"].batches == [1]
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_files_of_several_processes_are_joined(labelled: Path, tmp_path: Path) -> None:
    file = tmp_path / "resume.json"
    whole = run(labelled, resume=file)
    head, *lines = file.read_text().splitlines(keepends=True)
    file.write_text(head + lines[0])
    file.with_name("resume.json.1").write_text(head + lines[1] + lines[5])
    models = {"dense": Linear(0), "pruned": Linear(1)}
    assert run(labelled, models=models, resume=file) == whole
    assert len(models["dense"].batches) == 3
    assert not file.with_name("resume.json.1").exists()


def test_another_evaluation_is_refused(labelled: Path, tmp_path: Path) -> None:
    file = tmp_path / "resume.json"
    run(labelled, resume=file, identity={"schedule": "0:0.8"})
    before = file.read_text()
    with pytest.raises(EvaluationError, match=r'schedule: "0:0.8" there, "0:0.5" here'):
        run(labelled, resume=file, identity={"schedule": "0:0.5"})
    with pytest.raises(EvaluationError, match="batch size: 4 there, 3 here"):
        run(labelled, resume=file, identity={"schedule": "0:0.8"}, batch_size=3)
    picture(labelled / "n0000" / "more.png", 99)
    with pytest.raises(EvaluationError, match="pictures: 21 there, 22 here; listing: "):
        run(labelled, resume=file, identity={"schedule": "0:0.8"})
    assert file.read_text() == before


def test_other_weights_are_another_evaluation(labelled: Path, tmp_path: Path) -> None:
    def net(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIDE * SIDE, CLASSES))

    file = tmp_path / "resume.json"
    first = run(labelled, models={"dense": net(0)}, resume=file)
    assert run(labelled, models={"dense": net(0)}, resume=file) == first
    with pytest.raises(EvaluationError, match=r"models: .*Sequential"):
        run(labelled, models={"dense": net(1)}, resume=file)


@pytest.mark.parametrize("content", ['{"top1": 71.2}\n', '{"top1": 71.2}', "notes", "[]\n", "\n"])
def test_a_file_that_is_no_resume_file_stays_as_it_is(labelled: Path, tmp_path: Path, content: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(EvaluationError, match="is no resume file of this command"):
        run(labelled, resume=file)
    assert file.read_text() == content


def test_a_resume_file_that_cannot_be_written(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="No such file or directory; give a file that can be written"):
        run(labelled, resume=tmp_path / "no" / "resume.json")


def test_models_that_cannot_be_scored(labelled: Path) -> None:
    with pytest.raises(EvaluationError, match=r"pruned gave \[4, 3\] for 4 pictures, not logits \[4, 7\]"):
        run(labelled, models={"dense": Linear(0), "pruned": lambda x: torch.zeros(len(x), 3)})
    with pytest.raises(EvaluationError, match="pruned gave logits that are not finite"):
        run(labelled, models={"dense": Linear(0), "pruned": lambda x: torch.full((len(x), 7), math.nan)})
    with pytest.raises(EvaluationError, match="the reference 'dense' is none of the models; they are pruned"):
        run(labelled, models={"pruned": Linear(0)})


def test_models_get_the_dtype(labelled: Path) -> None:
    seen = set()

    def model(x: Tensor) -> Tensor:
        seen.add(x.dtype)
        return torch.zeros(len(x), CLASSES, dtype=x.dtype)

    run(labelled, models={"dense": model}, dtype=torch.bfloat16)
    assert seen == {torch.bfloat16}
