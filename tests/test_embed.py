"""`rs_compile.embed` and `rs-compile embed`: every picture once, whatever is killed, and what is skipped is said."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import rs_compile
from rs_compile import EmbedError
from rs_compile.cli import main
from rs_compile.embed.features import Features
from rs_compile.embed.loader import Batch, Failure
from rs_compile.embed.speed import Speed
from rs_compile.models import build, load_images

SIDE = 64


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (70, 80, 3), dtype=np.uint8))


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(1)
    return build("test_vit", img_size=SIDE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures, one below, two files that are none, and one of another kind."""
    root = tmp_path / "pictures"
    (root / "below").mkdir(parents=True)
    for i in range(9):
        (root / f"{i}.png").write_bytes(encoded(i))
    (root / "below" / "9.PNG").write_bytes(encoded(9))
    (root / "3b.jpg").write_bytes(b"no picture")
    (root / "5b.png").write_bytes(encoded(5)[:2000])
    (root / "notes.txt").write_text("no picture, and not said to be one")
    return root


@pytest.fixture
def checkpoint(tmp_path: Path, model: nn.Module) -> Path:
    torch.save(model.state_dict(), tmp_path / "w.pth")
    return tmp_path / "w.pth"


def embedded(model: nn.Module, source: Any, **options: Any) -> tuple[dict[str, Tensor], list[Failure]]:
    """Features by path, each met once."""
    found = rs_compile.embed(model, {0: 0.5}, source, backend="eager", **{"batch_size": 4, "workers": 0} | options)
    by_path: dict[str, Tensor] = {}
    for names, features in found:
        assert len(names) == len(features) and not by_path.keys() & set(names)
        by_path |= dict(zip(names, features, strict=True))
    return by_path, found.failures


@torch.no_grad()
def wanted(model: nn.Module, paths: list[Path], kind: str = "class") -> Tensor:
    fast = rs_compile.optimize(Features(model, kind).eval(), {0: 0.5}, backend="eager")
    result: Tensor = fast(load_images(paths, model, SIDE))
    return result


def arguments(source: Path, checkpoint: Path, out: Path, *more: str) -> list[str]:
    options = ["--model", "test_vit", "--img-size", str(SIDE), "--checkpoint", str(checkpoint), "--schedule", "0:0.5"]
    small = ["--backend", "eager", "--batch-size", "2", "--shard-size", "2", "--workers", "1"]
    return ["embed", str(source), *options, "-o", str(out), *small, *more]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_picture_once_and_failures_beside_them(model: nn.Module, folder: Path, workers: int) -> None:
    found, failures = embedded(model, folder, workers=workers)
    paths = [*(folder / f"{i}.png" for i in range(9)), folder / "below" / "9.PNG"]
    assert list(found) == [str(path) for path in paths]
    torch.testing.assert_close(torch.stack(list(found.values())), wanted(model, paths))
    assert failures == [
        (str(folder / "3b.jpg"), "no picture in a format that Pillow reads"),
        (str(folder / "5b.png"), "image file is truncated"),
    ]


@pytest.mark.parametrize("kind, shape", [("pooled", (64,)), ("tokens", (17, 64)), ("output", (1000,))])
def test_kinds_of_features(model: nn.Module, folder: Path, kind: str, shape: tuple[int, ...]) -> None:
    paths = [folder / "0.png", folder / "1.png"]
    found, _ = embedded(model, paths, features=kind)
    features = torch.stack(list(found.values()))
    assert features.shape == (2, *shape)
    torch.testing.assert_close(features, wanted(model, paths, kind))


def test_parquet_tars_and_videos(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "mixed"
    root.mkdir()
    pq.write_table(pa.table({"path": ["../pictures/1.png", "gone.png"], "label": [1, 2]}), root / "a.parquet")
    rows = [{"bytes": encoded(1), "path": "x"}, None, {"bytes": b"?", "path": None}, {"bytes": encoded(2), "path": "y"}]
    pq.write_table(pa.table({"image": rows, "text": list("abcd")}), root / "b.parquet", row_group_size=3)
    with tarfile.open(root / "c.tar", "w") as tar:
        for name, content in (("0.png", encoded(1)), ("0.cls", b"7"), ("1.jpg", b"?")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with av.open(root / "d.mkv", "w") as video:
        stream = video.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 80, 70, "bgr0"
        for seed in (1, 2, 3, 4, 5):
            video.mux(stream.encode(av.VideoFrame.from_image(picture(seed))))
        video.mux(stream.encode())
    (root / "e.mp4").write_bytes(b"no video")
    (root / "f.tar").write_bytes((root / "c.tar").read_bytes()[:5000])
    found, failures = embedded(model, root, every=2, workers=2)
    a = os.path.join(root, "../pictures/1.png")
    names = [f"{root}/{n}" for n in ("b.parquet#0", "b.parquet#3", "c.tar#0.png", "d.mkv#0", "d.mkv#2", "d.mkv#4")]
    assert sorted(found) == sorted([a, *names])
    same = wanted(model, [folder / f"{i}.png" for i in (1, 1, 2, 1, 1, 3, 5)])
    torch.testing.assert_close(torch.stack([found[name] for name in (a, *names)]), same)
    assert {path.removeprefix(f"{root}/"): reason for path, reason in failures} == {
        "gone.png": f"there is no image file {root}/gone.png",
        "b.parquet#1": "the row has no picture",
        "b.parquet#2": "no picture in a format that Pillow reads",
        "c.tar#1.jpg": "no picture in a format that Pillow reads",
        "e.mp4": "cannot be read, or not to its end: Invalid data found when processing input",
        "f.tar": "cannot be read, or not to its end: unexpected end of data",
    }


def test_files_are_read_by_pandas_and_polars(model: nn.Module, folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(arguments(folder, checkpoint, out, "--features", "tokens", "--store", "float16")) == 0
    table = pandas.read_parquet(out / "features")
    names = [str(folder / f"{i}.png") for i in range(9)] + [str(folder / "below" / "9.PNG")]
    assert list(table.path) == names
    stored = polars.read_parquet(out / "features" / "*.parquet")
    assert stored.schema["features"] == polars.Array(polars.Float16, (17, 64)) and list(stored["path"]) == names
    features = torch.tensor(np.stack([np.stack(row) for row in table.features]))
    assert features.dtype == torch.float16
    exact = wanted(model, [Path(name) for name in names], "tokens")
    torch.testing.assert_close(features.float(), exact, rtol=2e-3, atol=1e-4)
    skipped = pandas.read_parquet(out / "skipped")
    assert [Path(path).name for path in skipped.path] == ["3b.jpg", "5b.png"]


def test_a_run_goes_on_with_the_same_settings_only(
    folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(arguments(folder, checkpoint, out)) == 0
    assert "6 files written, 0 there before" in capsys.readouterr().out
    (folder / "0a.png").write_bytes(encoded(20))  # behind the plan: moves nothing
    (folder / "3b.jpg").write_bytes(encoded(21))
    assert main(arguments(folder, checkpoint, out, "--json", "-")) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["files_written"], said["files_before"], said["pictures"]) == (0, 6, 0)
    assert main(arguments(folder, checkpoint, out, "--again")) == 0
    assert "2 files written, 4 there before" in capsys.readouterr().out
    paths = [Path(path).name for path in pandas.read_parquet(out / "features").path]
    assert sorted(paths) == sorted([*(f"{i}.png" for i in range(9)), "9.PNG", "3b.jpg"])
    assert [Path(path).name for path in pandas.read_parquet(out / "skipped").path] == ["5b.png"]
    assert main(arguments(folder, checkpoint, out, "--features", "pooled")) == 2
    assert "begun with other settings (features: 'class', now 'pooled'); give these again" in capsys.readouterr().err
    new = tmp_path / "new"
    assert main(arguments(folder, checkpoint, new, "--schedule", "9:0.5")) == 2
    assert "the schedule names block 9" in capsys.readouterr().err
    assert main(arguments(folder, checkpoint, new)) == 0
    assert main(arguments(folder, checkpoint, folder)) == 2
    assert "holds other files" in capsys.readouterr().err


def test_killed_at_random_points_nothing_is_lost_or_doubled(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Processes of their own, killed with SIGKILL some time behind the first new file, then one that ends."""
    for i in range(10, 60):
        (folder / f"{i}.png").write_bytes(encoded(i))
    out, argv = tmp_path / "out", arguments(folder, checkpoint, tmp_path / "out")
    context, chosen, killed = multiprocessing.get_context("fork"), random.Random(0), []
    for _ in range(3):
        process = context.Process(target=main, args=(argv,))
        before = len(list(out.glob("features/part-*")))
        process.start()
        while process.is_alive() and len(list(out.glob("features/part-*"))) == before:
            time.sleep(0.001)
        time.sleep(chosen.random() * 0.05)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        killed.append(process.exitcode == -signal.SIGKILL and len(list(out.glob("features/part-*"))) < 31)
    assert all(killed)
    assert main(argv) == 0
    features, skipped = pandas.read_parquet(out / "features"), pandas.read_parquet(out / "skipped")
    every = [*(f"{i}.png" for i in range(9)), "9.PNG", *(f"{i}.png" for i in range(10, 60))]
    assert sorted(Path(path).name for path in features.path) == sorted(every)
    assert sorted(Path(path).name for path in skipped.path) == ["3b.jpg", "5b.png"]
    assert not list(out.rglob(".partial*"))


@pytest.mark.slow
def test_processes_of_torchrun_write_disjoint_files(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv, counts = arguments(folder, checkpoint, tmp_path / "out"), []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(argv) == 0
        counts.append(len(list((tmp_path / "out" / "features").iterdir())))
    assert counts == [3, 6]
    assert len(set(pandas.read_parquet(tmp_path / "out" / "features").path)) == 10


def test_what_float16_cannot_hold_is_refused(
    model: nn.Module, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {k: v * 1e6 if k == "norm.weight" else v for k, v in model.state_dict().items()}
    torch.save(weights, tmp_path / "big.pth")
    argv = arguments(folder, tmp_path / "big.pth", tmp_path / "out", "--store", "float16")
    assert main(argv) == 2
    assert "beyond what float16 holds (65504)" in capsys.readouterr().err
    assert not list((tmp_path / "out" / "features").iterdir())


def test_what_is_not_finite_is_skipped(folder: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum((2, 3)).log()

    def transform(image: Image.Image) -> Tensor:
        return torch.full((3, 4, 4), -1.0 if image.getpixel((0, 0)) == picture(1).getpixel((0, 0)) else 1.0)

    paths = [folder / f"{i}.png" for i in range(3)]
    found = rs_compile.embed(
        Odd().eval(), {}, paths, features="output", transform=transform, workers=0, backend="eager"
    )
    assert [Path(name).name for names, _ in found for name in names] == ["0.png", "2.png"]
    assert found.failures == [(str(paths[1]), "the model gives infinity or NaN for it")]


def test_speed_says_when_decoding_is_the_limit() -> None:
    speed = Speed(2)
    for waited in (9.0, 3.0, 3.0):
        batch = Batch(0, ["a", "b"], seconds=0.5)
        speed.waited(waited, batch)
        speed.computed(1.0, batch)
    assert speed.first_seconds == 10 and speed.per_second == 0.5 and speed.waiting == 0.75
    assert "decoding is the limit: the model alone does 2.0 pictures a second" in str(speed)
    assert "decoding takes 250.0 ms a picture, in 2 workers" in str(speed)
    speed.used(1000.0)
    assert "it keeps up with the model" in str(speed)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"features": "cls"}, "features is 'cls'; write one of class, pooled, tokens, output"),
        ({"batch_size": 0}, "batch_size is 0; give an integer of at least 1"),
        ({"source": "/nowhere"}, "there is no folder or file /nowhere"),
        ({"source": 3}, "the source is a int; pass a folder"),
        ({"source": []}, "nothing to embed in the paths given"),
        ({"model": nn.Linear(2, 2)}, "train mode"),
        ({"model": nn.Linear(2, 2).eval()}, "pass transform="),
    ],
)
def test_refusals(model: nn.Module, folder: Path, options: dict[str, Any], words: str) -> None:
    given = {"model": model, "source": folder} | options
    with pytest.raises(EmbedError) as caught:
        rs_compile.embed(given.pop("model"), {}, given.pop("source"), **given)
    assert words in str(caught.value)


def test_a_model_without_a_class_token_is_refused() -> None:
    with pytest.raises(EmbedError, match="ResNet has no class token; ask for pooled features"):
        rs_compile.embed(build("test_resnet"), {}, ".")
