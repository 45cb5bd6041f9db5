"""`python -m bench.evaluate`, in-process and under torchrun: exit codes, what stands where, the words of errors."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import transformers
from dual_encoders import CROP, clip, save
from PIL import Image

from bench.evaluate import __main__ as command
from bench.evaluate.__main__ import main

IMAGES = (
    "images",
    "--model",
    "test_vit",
    "--img-size",
    "64",
    "--num-classes",
    "4",
    "--random-weights",
    "--workers",
    "0",
)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four class folders of two pictures."""
    for i in range(8):
        path = tmp_path / "val" / f"c{i // 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.RandomState(i).randint(0, 255, (70, 80, 3), dtype=np.uint8)).save(path)
    return tmp_path / "val"


@pytest.fixture
def videos(tmp_path: Path) -> tuple[str, ...]:
    """Three videos with a caption each, as options."""
    (tmp_path / "videos").mkdir()
    for i in range(3):
        with av.open(str(tmp_path / "videos" / f"{i}.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=Fraction(25))
            stream.width, stream.height, stream.pix_fmt = 40, 32, "yuv420p"
            for j in range(6):
                pixels = np.random.RandomState(10 * i + j).randint(0, 255, (32, 40, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    captions = {f"{i}.mkv": text for i, text in enumerate(("red fish", "two birds", "sky"))}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    return "--videos", str(tmp_path / "videos"), "--captions", str(tmp_path / "captions.json"), "--workers", "0"


def error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err


def test_images(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.json"
    argv = (*IMAGES, "--imagenet", str(pictures), "--schedule", "0:0.5", "--json", str(target))
    resume = ("--resume", str(tmp_path / "r.json"))
    assert main((*argv, *resume)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"test_vit, 8 pictures of {pictures}, float32; pruned: 0:0.5"
    assert lines[1].split("  ")[0] == "model" and lines[3].split()[0] == "dense" and lines[4].split()[0] == "pruned"
    assert lines[3].split()[2:] == ["100.00", "100.00", "1.0000", "0.0000"]  # all four classes are in the first five
    assert lines[5] == "random weights: this shows that it runs, not what the model can do"
    content = json.loads(target.read_text())
    assert content["schedule"]["keep"] == {"0": 0.5} and content["random_weights"] is True
    dense, pruned = content["rows"]
    assert (dense["method"], dense["images"], dense["agreement"], dense["skipped"]) == ("dense", 8, 100, [])
    assert pruned["kl"] > 0 and pruned["cosine"] < 1
    with_other = (*IMAGES, "--imagenet", str(pictures), "--schedule", "0:0.6", *resume)
    said = error(capsys, *with_other)
    assert 'schedule: {"version": 1' in said and '"keep": {"0": 0.5}' in said
    (pictures / "c1" / "broken.png").write_bytes(b"no picture")
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert "8 pictures" in out and "left out, as they could not be read: 1\n  c1/broken.png: cannot identify" in err
    assert json.loads(target.read_text())["rows"][1]["skipped"][0]["file"] == "c1/broken.png"


def test_what_images_refuses(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = ("--imagenet", str(pictures))
    other = [item if item != "4" else "10" for item in IMAGES]
    assert "has 4 class folders, the model 10 classes" in error(capsys, *other, *here)
    none = [item if item != "4" else "0" for item in IMAGES]
    assert "test_vit has no classifier" in error(capsys, *none, *here)
    assert "there is no folder" in error(capsys, *IMAGES, "--imagenet", str(tmp_path / "nowhere"))
    assert "is no device" in error(capsys, *IMAGES, *here, "--device", "toaster")
    assert "'0' is not block:ratio" in error(capsys, *IMAGES, *here, "--schedule", "0")
    torch.save({"head.weight": torch.zeros(3)}, tmp_path / "other.pth")
    weights = [item for item in IMAGES if item != "--random-weights"]
    assert "does not fit" in error(capsys, *weights, "--checkpoint", str(tmp_path / "other.pth"), *here)


def test_interrupted(pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate_images", interrupted)
    argv = (*IMAGES, "--imagenet", str(pictures))
    assert main((*argv, "--resume", "r.json")) == 130
    out, err = capsys.readouterr()
    assert out == "" and "interrupted; the same command goes on from r.json" in err
    assert main(argv) == 130 and "with --resume FILE it would go on" in capsys.readouterr().err


def test_retrieval(videos: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(clip(), transformers.CLIPImageProcessor(**CROP), tmp_path / "clip")
    encoder = ("retrieval", "--encoder", str(tmp_path / "clip"), "--frames", "2", "--schedule", "0:0.5")
    assert main((*encoder, *videos, "--json", str(tmp_path / "o.json"))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "3 videos of " in lines[0] and "3 captions, 2 frames, float32; pruned: 0:0.5" in lines[0]
    ways = ["text to video", "video to text", "arithmetic mean", "harmonic mean"]
    starts = [f"{method:7}  {way}" for method in ("dense", "pruned") for way in ways]
    assert [line.rstrip()[: len(start)] for line, start in zip(lines[3:], starts, strict=True)] == starts
    assert lines[3].split()[-1] == "100.0"  # R@10 of three
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "pruned"] and rows[0]["harmonic"]["r10"] == 100
    (tmp_path / "videos" / "1.mkv").write_bytes(b"no video")
    assert main((*encoder, *videos)) == 1
    assert "1.mkv: Invalid data found when processing input" in capsys.readouterr().err
    (tmp_path / "videos" / "2.mkv").unlink()
    assert "has captions for videos that are not in" in error(capsys, *encoder, *videos)


SCRIPT = """
import json, sys
from dataclasses import asdict
from pathlib import Path
import torch
from timm.data import create_transform
from bench.evaluate.images import evaluate_images
from bench.evaluate.ranks import Ranks

folder, out = map(Path, sys.argv[1:])
calls = []
def model(seed):
    weight = torch.randn(4, 3 * 64, generator=torch.Generator().manual_seed(seed))
    def run(x):
        calls.append(len(x))
        return x.flatten(1) @ weight.T
    return run
scores = evaluate_images({"dense": model(0), "pruned": model(1)}, "dense", folder, create_transform((3, 8, 8)),
    classes=4, batch_size=2, workers=0, resume=out / "resume.json")
ranks = Ranks.join()
result = {"scores": {name: asdict(s) for name, s in scores.items()}, "calls": calls}
(out / f"{ranks.rank}of{ranks.world}.json").write_text(json.dumps(result))
"""


@pytest.mark.slow
def test_two_processes_under_torchrun(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pictures / "c2" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "script.py").write_text(SCRIPT)
    argv = [str(tmp_path / "script.py"), str(pictures), str(tmp_path)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *argv], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}of2.json").read_text()) for rank in (0, 1))
    assert first["scores"] == second["scores"]
    assert first["scores"]["dense"]["images"] == 8
    assert [s["file"] for s in first["scores"]["dense"]["skipped"]] == ["c2/broken.png"]
    # five batches of both models: three here, two there
    assert (len(first["calls"]), len(second["calls"])) == (6, 4)
    kept = (tmp_path / "resume.json", tmp_path / "resume.json.1")
    assert [len(file.read_text().splitlines()) for file in kept] == [4, 3]
    # one process goes on from both files and finds nothing to do; without them it comes to the same
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(argv[0])
    alone = json.loads((tmp_path / "0of1.json").read_text())
    assert alone == {"scores": first["scores"], "calls": []} and not kept[1].exists()
    kept[0].unlink()
    runpy.run_path(argv[0])
    alone = json.loads((tmp_path / "0of1.json").read_text())
    assert alone["scores"] == first["scores"] and len(alone["calls"]) == 10
