"""The command line in-process: exit codes, what stands on stdout, and the words of errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rs_compile import cli, comparison, demo, predict, timing
from rs_compile.cli import main
from rs_compile.models import build
from rs_compile.schedule import removed


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    torch.manual_seed(1)
    path = tmp_path / "w.pth"
    torch.save({"model": build("test_vit", img_size=64).state_dict()}, path)
    return str(path)


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (80, 90, 3), dtype=np.uint8)).save(path)
    return str(path)


def error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a refusal; nothing may reach stdout, and no traceback stderr."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.count("rs-compile: ") == 1
    return err[err.index("rs-compile: ") :]


def usage_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "test_vit", "--img-size", "64"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "VisionTransformer"
    assert lines[1].split() == ["block", "where", "kind", "tokens", "attention", "prunable"]
    assert lines[3].split() == ["0", "blocks.0", "attention", "+", "mlp", "17", "flash", "yes"]
    assert err == "building test_vit\ncapturing test_vit\n"


def test_explain_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["explain", "test_vit", "--img-size", "64", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["tokens"] for row in content["rows"]] == [17] * 6
    target = tmp_path / "e.json"
    assert main(["explain", "test_vit", "--img-size", "64", "--json", str(target)]) == 0
    assert capsys.readouterr().out.startswith("VisionTransformer")
    assert json.loads(target.read_text()) == content


def test_explain_of_a_model_without_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "test_resnet", "--img-size", "64"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0", "layer1.0", "1", "16", "x", "16", "yes"] in lines


BENCH = ("bench", "test_vit", "--img-size", "64", "--batch-size", "2", "--rounds", "2", "--backend", "eager")


def test_bench(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "b.json"
    assert main([*BENCH, "--schedule", "0:0.8,3:0.5", "--json", str(target)]) == 0
    out, err = capsys.readouterr()
    assert "VisionTransformer, float32[B, 3, 64, 64] on cpu" in out  # the report
    assert "speed-up over model, eager" in out and f"{timing.PRUNED}, ms" in out
    assert "batch 2: rs_compile: capturing the model" in err and "batch 2: round 2 of 2" in err
    content = json.loads(target.read_text())
    assert content["model"] == "test_vit" and content["schedule"]["keep"] == {"0": 0.8, "3": 0.5}
    (only,) = content["batches"]
    assert only["batch"] == 2 and len(only["seconds"][timing.PRUNED]) == 2
    assert set(only["speed_up"][timing.PRUNED]) == {"median", "quartile_low", "quartile_high"}
    kept = 17 - removed(17, 0.8)
    assert [row["tokens_out"] for row in content["report"]["blocks"]] == [kept] * 3 + [kept - removed(kept, 0.5)] * 3


def test_bench_at_several_batch_sizes_says_what_a_guard_would_keep(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._parser().parse_args(["bench", "test_vit"]).batch_size == (1, 4, 16, 64)
    assert main([*BENCH, "--schedule", "0:0.5", "--batch-size", "1", "3"]) == 0
    table = capsys.readouterr().out.partition("\n\n")[2].splitlines()
    assert table[0].endswith("guard keeps")
    assert [row.split()[0] for row in table[2:4]] == ["1", "3"]
    assert all(row.split()[-1] in ("dense", "pruned") for row in table[2:4])


def test_bench_in_bfloat16_with_a_schedule_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = '{"keep": {"1": 0.5}, "score": {"kind": "class-attention"}}'
    assert main([*BENCH, "--schedule", schedule, "--dtype", "bfloat16", "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)  # JSON and nothing else
    assert content["batches"][0]["settings"]["dtype"] == "bfloat16"
    assert content["schedule"]["score"] == {"kind": "class-attention"}


def test_bench_sets_threads(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        assert main([*BENCH, "--schedule", "0:0.5", "--threads", "1"]) == 0
        assert "threads 1" in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)


def test_run_shows_both_side_by_side(capsys: pytest.CaptureFixture[str], checkpoint: str, image: str) -> None:
    command = ["run", image, image, "--model", "test_vit", "--img-size", "64", "--checkpoint", checkpoint]
    assert main([*command, "--schedule", "0:1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["image", "dense", "%", "pruned", "%"]
    assert lines[2].startswith(image) and lines[7].startswith(image)
    # nothing is pruned, so that all must agree
    assert lines[12] == ("agreement: the same first class on 2 of 2 images, 10 of the 10 classes listed in both")
    assert lines[13].startswith("GMACs an image: ")
    assert main([*command, "--schedule", "0:0.5", "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["macs"] < content["macs_dense"]
    first = content["images"][0]
    assert len(first["dense"]) == len(first["pruned"]) == 5
    model = build("test_vit", img_size=64, checkpoint=Path(checkpoint))
    from rs_compile.models import class_names, load_images

    best = int(model(load_images([Path(image)], model, 64)).argmax())
    assert first["dense"][0]["index"] == best and first["dense"][0]["name"] == class_names(1000)[best]


def test_run_of_a_model_without_classes(capsys: pytest.CaptureFixture[str], tmp_path: Path, image: str) -> None:
    path = tmp_path / "f.pth"
    torch.save(build("test_vit", img_size=64, num_classes=0).state_dict(), path)
    command = ["run", image, "--model", "test_vit", "--img-size", "64", "--num-classes", "0"]
    assert main([*command, "--checkpoint", str(path), "--schedule", "0:1"]) == 0
    out = capsys.readouterr().out
    assert "cosine of dense and pruned features" in out and "1.0000" in out


def test_agreement_counts_what_is_shared() -> None:
    def guesses(*indices: int) -> tuple[predict.Guess, ...]:
        return tuple(predict.Guess(i, f"class {i}", 0.1) for i in indices)

    images = (
        predict.Prediction("a", guesses(1, 2, 3), guesses(1, 3, 4), 0.9),
        predict.Prediction("b", guesses(1, 2, 3), guesses(2, 1, 3), 0.9),
    )
    assert predict.Predictions(images, 2, 1).agreement() == (
        "agreement: the same first class on 1 of 2 images, 5 of the 6 classes listed in both"
    )


def test_errors_of_names_and_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    assert "timm has no model 'test_vitt'; nearest: test_vit" in error(capsys, "explain", "test_vitt")
    assert "the keep ratio of block 0 is 8.0" in error(capsys, *BENCH, "--schedule", "0:8")
    assert "'0' is not block:ratio; write pairs like" in error(capsys, *BENCH, "--schedule", "0")
    assert "the schedule is no JSON" in error(capsys, *BENCH, "--schedule", "{0")
    assert "names block 6, but the model has 6 blocks" in error(capsys, *BENCH, "--schedule", "6:0.5")
    assert "no residual MLP branch" in error(capsys, "bench", "test_resnet", "--img-size", "64", "--schedule", "0:0.5")


def test_errors_of_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: str, image: str) -> None:
    def run(photo: str, file: str, *more: str) -> str:
        return error(capsys, "run", photo, "--model", "test_vit", "--img-size", "64", "--checkpoint", file, *more)

    assert "there is no checkpoint file" in run(image, str(tmp_path / "none.pt"))
    assert "cannot be read as weights" in run(image, image)
    assert "there is no image file" in run(str(tmp_path / "none.png"), checkpoint)
    assert "cannot be read as an image" in run(checkpoint, checkpoint)
    assert "head.weight is [1000, 64], the model's [3, 64]" in run(image, checkpoint, "--num-classes", "3")
    module = tmp_path / "module.pt"
    torch.save(torch.nn.Linear(2, 2), module)
    assert "could run code" in run(image, str(module))


def test_errors_of_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--device tpu9 is no device; write cpu, cuda or cuda:0" in error(capsys, *BENCH, "--device", "tpu9")
    assert "--device meta: write cpu" in error(capsys, *BENCH, "--device", "meta")
    assert "this machine has" in error(capsys, *BENCH, "--device", "cuda:99")
    nowhere = str(tmp_path / "no" / "b.json")
    assert f"--json {nowhere}: no file can be written there" in error(capsys, *BENCH, "--json", nowhere)
    assert "is not an integer of at least 1" in usage_error(capsys, *BENCH, "--rounds", "0")
    assert "invalid choice: 'int8'" in usage_error(capsys, *BENCH, "--dtype", "int8")
    assert "--checkpoint --pretrained is required" in usage_error(capsys, "run", "a.png", "--model", "test_vit")
    assert "COMMAND" in usage_error(capsys)


def test_a_backend_that_fails_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch._inductor.exc.InductorError(torch._inductor.exc.InvalidCxxCompiler(), None)

    monkeypatch.setattr(comparison, "compare", fail)
    text = error(capsys, *BENCH, "--schedule", "0:0.5")
    assert "torch.compile's backend failed: InvalidCxxCompiler" in text and "or pass --backend eager" in text


def test_an_interrupt_is_no_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "rs-compile: interrupted\n"


def test_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "d.json"
    assert main(["demo", "--quick", "--backend", "eager", "--json", str(target)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[1].split("  ")[0] == "keep after blocks" and lines[3].split()[:3] == [
        "none",
        "pruned",
        "101",
    ]
    assert lines[4].startswith("0:0.7,2:0.7,4:0.7    101 > 71 > 50 > 35")
    assert lines[-1].startswith("Shift pruning is more accurate than random pruning (mean of 5 seeds) in ")
    assert "keep 0.7, class-attention: capturing the model" in err
    content = json.loads(target.read_text())
    assert content["images"] == 596 and content["accuracy"] > 0.9
    row = content["rows"][0]
    assert row["tokens"] == [101, 71, 50, 35] and row["macs"] < content["macs"]
    assert row["shift"] > 0.8 and row["class_attention"] > 0.8
    assert len(set(row["random"])) > 1  # seeds differ
    assert row["random_mean"] == pytest.approx(np.mean(row["random"]))


def row_of(shift: float, class_attention: float, random: float) -> demo.Row:
    return demo.Row("0:0.5", (9, 5), 1, shift, class_attention, (random,), timing.Spread(1, 1, 1))


def test_the_verdict_counts_wins_and_no_ties() -> None:
    rows = (row_of(0.9, 0.9, 0.8), row_of(0.7, 0.6, 0.7), row_of(0.5, 0.6, 0.7))
    text = demo.Demo(400, 0.96, 9, 2, "x", 1, 1, 1, rows).verdict()
    assert "(mean of 5 seeds) in 1 of 3 rows and than class attention in 1 of 3" in text
    assert "one image is 0.25 points and the standard error of the dense accuracy 1.0" in text


def test_demo_without_scikit_learn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "pip install 'rs-compile[demo]'" in error(capsys, "demo")


def test_the_module_runs_as_a_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rs_compile.cli", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("demo", "explain", "bench", "run"))
