"""Files of rewritten models against the handle that they were made from."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from runtimes import encoder, far, images
from torch import Tensor, nn

import rs_compile
from rs_compile import ExportError, Schedule
from rs_compile.cli import main
from rs_compile.exporting import formats

PRUNED = Schedule({0: 0.8, 1: 0.7})


def made(schedule: Schedule = PRUNED, **options: Any) -> Any:
    return rs_compile.optimize(encoder(), schedule, backend="eager", **options)


@torch.no_grad()
@pytest.mark.parametrize("example", [1, 3])
def test_torch_export_is_bit_equal_and_keeps_the_nesting(tmp_path: Path, example: int) -> None:
    fast, path = made(), tmp_path / "m.pt2"
    rs_compile.export(fast, images(example), path)
    loaded = torch.export.load(path).module()
    for batch in (1, 2, 3):
        found, wanted = loaded(images(batch)), fast(images(batch))
        assert list(found) == ["logits", "tokens"] and isinstance(found["tokens"], tuple)
        assert torch.equal(found["logits"], wanted["logits"])
        assert torch.equal(found["tokens"][0], wanted["tokens"][0])
    dense = encoder()(images(3))["logits"]
    assert far(loaded(images(3))["logits"], dense) > 1e-3  # something left


@torch.no_grad()
def test_a_file_loads_without_this_package(tmp_path: Path) -> None:
    """Short token outputs too, whose class is ours."""
    fast, path, out = made(token_outputs="compact"), tmp_path / "m.pt2", tmp_path / "out.pt"
    rs_compile.export(fast, images(2), path)
    torch.save(images(3), tmp_path / "x.pt")
    code = f"""
import sys, torch
sys.modules["rs_compile"] = sys.modules["passes"] = None
torch.set_num_threads({torch.get_num_threads()})  # of which the last bits depend
torch.save(torch.export.load({str(path)!r}).module()(torch.load({str(tmp_path / "x.pt")!r})), {str(out)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    tokens, kept = torch.load(out)["tokens"][0]
    wanted = fast(images(3))["tokens"][0]
    assert torch.equal(tokens, wanted.tokens) and torch.equal(kept, wanted.kept)


def test_the_file_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.pt2"
    written = rs_compile.export(made(), images(2), path, name="small", notes={"weights": "random"})
    said = rs_compile.info(path)
    assert said == written and Schedule.from_json(json.dumps(said.content["schedule"])) == PRUNED
    assert [row["tokens_out"] for row in said.content["report"]["blocks"]] == [14, 10, 10]
    assert main(["info", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("small, torch.export: float32[B, 3, 32, 32] on cpu\n")
    assert "tokens behind each: 14 10 10" in shown and f"torch {version('torch')}" in shown
    assert "weights: random" in shown


def test_info_of_foreign_files(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.pt2"
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), foreign)
    (tmp_path / "broken.pt2").write_bytes(b"PK")
    for name, words in (
        ("foreign.pt2", "does not say that rs_compile.export wrote it"),
        ("broken.pt2", "cannot be read: BadZipFile"),
        ("none.pt2", "there is no file"),
    ):
        with pytest.raises(ExportError, match=words):
            rs_compile.info(tmp_path / name)
    other = tmp_path / "m.txt"
    other.write_text("")
    with pytest.raises(ExportError, match=r"which end in \.pt2, \.onnx, \.xml or \.pte"):
        rs_compile.info(other)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """The file that was there stays, and nothing lies beside it."""
    path = tmp_path / "m.pt2"
    path.write_text("before")

    def stops(exported: Any, made: Path, text: str) -> None:
        made.write_text("half")
        raise error

    monkeypatch.setitem(formats.FORMATS, "torch.export", formats.Format(stops, ".pt2"))
    with pytest.raises(error):
        rs_compile.export(made(), images(2), path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_what_does_not_fit_is_refused_before_the_work(tmp_path: Path) -> None:
    fast, x = made(), images(2)
    for words, path, options in (
        (r"m\.txt is no format.*torch.export \(\.pt2\)", tmp_path / "m.txt", {}),
        (r"a file of onnx ends in \.onnx, not m\.pt2", tmp_path / "m.pt2", {"format": "onnx"}),
        ("in a directory that exists", tmp_path / "none" / "m.pt2", {}),
        (r"half_weights is OpenVINO's.*fast\.half\(\)", tmp_path / "m.pt2", {"half_weights": True}),
    ):
        with pytest.raises(ExportError, match=words):
            rs_compile.export(fast, x, path, **options)
    with pytest.raises(ExportError, match=r"train mode.*call fast\.eval\(\)"):
        rs_compile.export(rs_compile.optimize(encoder().train(), PRUNED), x, tmp_path / "m.pt2")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ExportError, match=r"autocast is on.*fast\.bfloat16\(\)"):
        rs_compile.export(fast, x, tmp_path / "m.pt2")
    with pytest.raises(ExportError, match=r"takes what rs_compile\.optimize returned, not Encoder"):
        plain: Any = encoder()
        rs_compile.export(plain, x, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


@torch.library.custom_op("export_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_exporters_refusal_names_op_line_and_way_out(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.encoder(x)["logits"]
            return twice(logits)

    fast = rs_compile.optimize(Twice().eval(), PRUNED, backend="eager")
    with pytest.raises(ExportError) as caught:
        rs_compile.export(fast, images(2), tmp_path / "m.onnx")
    text = str(caught.value)
    assert text.startswith("torch.onnx does not take export_tests.twice.default:")
    assert "test_export.py" in text and "return twice(logits)" in text and "way out: another format" in text
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.pt2"
    assert main(["export", "test_vit", "--img-size", "64", "--schedule", "0:0.5", "-o", str(path)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("test_vit, torch.export: float32[B, 3, 64, 64]") and "the weights are random" in err
    assert torch.export.load(path).module()(torch.randn(3, 3, 64, 64)).shape == (3, 1000)
    assert main(["export", "test_vit", "-o", str(tmp_path / "m.bin")]) == 2
    assert "is no format that can be written" in capsys.readouterr().err
