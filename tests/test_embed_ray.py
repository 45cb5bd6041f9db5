"""`rs-compile embed --engine ray`: the same features as the local engine's, whatever actor is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from rs_compile.cli import main
from rs_compile.embed.shards import Folder
from rs_compile.models import build

SIDE, PICTURES = 64, 48


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of the command, but for where to and by what engine."""
    (tmp_path / "pictures").mkdir()
    for i in range(PICTURES):
        pixels = np.random.default_rng(i).integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "pictures" / "odd.png").write_bytes(b"no picture")
    torch.manual_seed(1)
    torch.save(build("test_vit", img_size=SIDE).state_dict(), tmp_path / "w.pth")
    options = ["--model", "test_vit", "--checkpoint", str(tmp_path / "w.pth"), "--img-size", str(SIDE)]
    rest = ["--schedule", "0:0.5", "--backend", "eager", "--batch-size", "4", "--shard-size", "4", "--workers", "0"]
    return ["embed", str(tmp_path / "pictures"), *options, *rest]


def _kill_one(features: Path, killed: list[int]) -> None:
    """Kills the first process that has begun a file in the second half of them; files are named after it."""
    while not killed:
        time.sleep(0.001)
        for partial in features.glob(".partial-*"):
            chunk, process = map(int, partial.name.removeprefix(".partial-").split("-"))
            if chunk >= 4 and not killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)


@pytest.mark.slow
def test_an_actor_that_is_killed_loses_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    assert main([*arguments, "-o", str(tmp_path / "local")]) == 0
    capsys.readouterr()
    killed: list[int] = []
    watch = threading.Thread(target=_kill_one, args=(tmp_path / "ray" / "features", killed), daemon=True)
    watch.start()
    speed = tmp_path / "speed.json"
    assert (
        main([*arguments, "-o", str(tmp_path / "ray"), "--engine", "ray", "--actors", "2", "--json", str(speed)]) == 0
    )
    assert len(killed) == 1
    assert "13 files written, 0 there before" in capsys.readouterr().out
    assert json.loads(speed.read_text())["pictures"] == PICTURES
    local, ray = (pandas.read_parquet(tmp_path / name / "features").set_index("path") for name in ("local", "ray"))
    assert ray.index.is_unique and len(ray) == PICTURES and set(ray.index) == set(local.index)
    a, b = (np.stack(table.loc[sorted(local.index)].features.to_list()) for table in (local, ray))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert len(pandas.read_parquet(tmp_path / "ray" / "skipped")) == 1
    assert not list((tmp_path / "ray").rglob(".partial*"))


def test_attempts_at_a_file_are_counted(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.features.mkdir()
    assert folder.attempt(3) == 0 and folder.attempt(3) == 0  # one process
    for process in (1, 2):
        (folder.features / f".partial-000003-{process}").touch()
    assert folder.attempt(3) == 2 and folder.attempt(4) == 0


@pytest.mark.slow
def test_what_an_actor_refuses(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    weights = torch.load(tmp_path / "w.pth", weights_only=True)
    torch.save({k: v * 1e6 if k == "norm.weight" else v for k, v in weights.items()}, tmp_path / "w.pth")
    assert main([*arguments, "-o", str(tmp_path / "out"), "--engine", "ray", "--store", "float16"]) == 2
    assert "beyond what float16 holds (65504)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--actors", "2"], "--actors and --address are Ray's; write --engine ray beside them"),
        (["--engine", "ray"], "run --engine ray without torchrun"),
    ],
)
def test_refusals(
    options: list[str],
    words: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "ray" in options:
        pytest.importorskip("ray")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*arguments, "-o", str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_more_actors_than_cores_are_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    assert main([*arguments, "-o", str(tmp_path / "out"), "--engine", "ray", "--actors", "1000"]) == 2
    assert "1000 actors on CPU cores, of which Ray has" in capsys.readouterr().err
