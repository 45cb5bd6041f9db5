"""Words of refusals that other tests do not come by: files, folders and what a disk says."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import timm
import torch
from torch import nn

import rs_compile
from rs_compile.commands import UsageError, give
from rs_compile.demo.command import _write
from rs_compile.embed import sources
from rs_compile.embed.features import Features
from rs_compile.embed.loader import _stacked
from rs_compile.embed.ray_engine import _cluster, ray_data
from rs_compile.embed.shards import Folder
from rs_compile.embed.sources import _of_parquet
from rs_compile.models import ImageError, evaluation_transform
from rs_compile.search import drift, pictures, plot
from rs_compile.search.climb import Climb
from rs_compile.search.pictures import SearchError
from rs_compile.search.targets import _searched


def test_a_report_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="Is a directory; the table above is all there is"):
        give("the table", lambda: "{}", str(tmp_path))
    assert capsys.readouterr().out == "the table\n"


def test_features_of_a_model_that_has_none() -> None:
    with pytest.raises(rs_compile.EmbedError, match="Linear has no forward_features and forward_head, as timm"):
        Features(nn.Linear(2, 2), "class")


def test_pictures_of_several_sizes() -> None:
    with pytest.raises(rs_compile.EmbedError, match=r"the transform gives \[3, 4, 4\] for a and \[3, 5, 4\] for b"):
        _stacked([torch.zeros(3, 4, 4), torch.zeros(3, 5, 4)], ["a", "b"])


def test_a_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(rs_compile.EmbedError, match=r"file/out cannot be made \(Not a directory\)"):
        Folder(tmp_path / "file" / "out").make()


@pytest.mark.parametrize(
    ("columns", "column", "text"),
    [
        ({"a": ["x.png"], "b": ["y.png"]}, None, r"which column has the pictures\? Name it with --column"),
        ({"a": [1]}, None, "one of a, of which none has text or bytes"),
        ({"a": ["x.png"]}, "b", "has no column 'b' of paths or encoded pictures; it has a"),
        ({"a": ["x.png", None]}, None, "column 'a' of .* has rows without a path; leave them out"),
    ],
)
def test_tables_that_do_not_say_where_pictures_are(
    tmp_path: Path, columns: dict[str, list[Any]], column: str | None, text: str
) -> None:
    path = tmp_path / "t.parquet"
    pandas.DataFrame(columns).to_parquet(path)
    with pytest.raises(rs_compile.EmbedError, match=text):
        list(_of_parquet(str(path), column))


def test_a_file_whose_reader_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(rs_compile.ExportError, match=r"onnx is missing, which reads \.onnx; pip install") as error:
        rs_compile.info(tmp_path / "m.onnx")
    assert error.value.code == "RSC-802"


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**options: Any) -> None:
        raise ConnectionError("nobody listens")

    with pytest.raises(rs_compile.EmbedError, match=r"--address here: Ray cannot be reached there \(nobody listens\)"):
        _cluster(SimpleNamespace(init=refuses), "here").__enter__()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(rs_compile.EmbedError, match="--engine ray needs Ray") as error:
        ray_data()
    assert error.value.code == "RSC-802"


def test_packages_of_videos_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(rs_compile.EmbedError, match="there are videos, which need PyAV: pip install av"):
        sources.entries_of(str(tmp_path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(rs_compile.EmbedError, match="Parquet needs pyarrow: pip install"):
        sources.arrow()


def test_a_page_of_the_demo_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(rs_compile.CompileError, match="Is a directory; it was not written"):
        _write(tmp_path, b"page")


def test_pictures_have_one_channel_or_three() -> None:
    with pytest.raises(ImageError, match="the model wants 4 channels; image files have 1 or 3"):
        evaluation_transform(
            timm.create_model("test_vit", in_chans=4, pretrained_cfg_overlay={"input_size": (4, 160, 160)})
        )


def test_a_metric_of_no_known_name() -> None:
    with pytest.raises(SearchError, match='metric is \'l2\'; write "cosine", "kl", or a callable'):
        drift.choose("l2", nn.Identity(), torch.eye(3))


def test_a_folder_with_too_few_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(SearchError, match=r"has 1 pictures; give \d+ at least, better 64"):
        pictures.read(str(tmp_path), nn.Identity(), 64, 0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("front.bmp", r"front.bmp is no .png, .svg, .pdf file; give one"),
        ("none/front.png", "is in no folder that exists; give one that does"),
    ],
)
def test_a_plot_that_cannot_be_drawn(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(SearchError, match=text):
        plot.check(tmp_path / name)


def test_a_model_that_refuses_every_method() -> None:
    """A stand-in whose methods are all refused: what each said is in the message."""
    method = SimpleNamespace(name="prune", merges=False, grid=False)
    evaluator = SimpleNamespace(count=lambda schedule: None, refusal=lambda schedule: "because")
    climb: Any = SimpleNamespace(
        methods=[method],
        bar=SimpleNamespace(say=lambda text: None),
        starts=lambda method: ["flat"],
        counts=lambda *given: {0: 4},
        evaluator=evaluator,
        _schedule=lambda method, counts: None,
    )
    with pytest.raises(SearchError, match=r"the model refuses every method.*\n  prune: because"):
        Climb.cheapest(climb, 1.0)
    tried = SimpleNamespace(target=1.0, macs=0, method=method, refused="because")
    climb = SimpleNamespace(screen=lambda macs: None, ranked=lambda macs: [], trials=[tried])
    with pytest.raises(SearchError, match=r"the model refuses every method.*\n  prune: because"):
        _searched(climb, 1.0)
