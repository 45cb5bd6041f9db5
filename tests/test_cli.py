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

from rs_compile import commands, comparison, predict, timing
from rs_compile.cli import main
from rs_compile.demo import command as demo
from rs_compile.models import build
from rs_compile.parser import parser
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
    text = err[err.index("rs-compile: ") :]
    assert text.count("\n") == 1  # one line
    return text


def usage_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.endswith(" --help says what it takes\n")
    return text


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
    assert parser().parse_args(["bench", "test_vit"]).batch_size == (1, 4, 16, 64)
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
    assert content["schedule"]["score"] == {"kind": "class-attention", "size_bias": False}


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


def test_a_fault_of_ours_is_one_line_and_a_traceback_with_debug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("blocks")

    monkeypatch.setattr(commands, "explain", fail)
    command = ["explain", "test_vit", "--img-size", "64"]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("rs-compile: KeyError: 'blocks'; way out: --debug shows where")
    with pytest.raises(KeyError, match="blocks"):
        main([*command, "--debug"])


def test_want_of_memory_names_what_to_make_smaller(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("too much was asked for")

    monkeypatch.setattr(commands, "explain", fail)
    text = error(capsys, "explain", "test_vit", "--img-size", "64")
    assert "out of memory: too much was asked for; way out: a smaller --batch-size" in text


def test_stdout_may_be_closed_by_who_reads_it() -> None:
    # the reader is gone before a word is written
    shell = f"(sleep 1; {sys.executable} -m rs_compile.cli completion bash; echo $? >&2) | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.stderr == "0\n"


def test_compare(capsys: pytest.CaptureFixture[str], checkpoint: str, image: str) -> None:
    folder = str(Path(image).parent)
    command = ["compare", "test_vit", "--images", folder, "--img-size", "64", "--checkpoint", checkpoint]
    command += ["--backend", "eager", "--rounds", "2", "--json", "-"]
    assert main([*command, "--schedule", "{}"]) == 0  # nothing leaves: nothing drifts
    same = json.loads(capsys.readouterr().out)
    assert same["outputs"][0]["drift"] < 1e-6 and same["macs_ratio"] == 1 and same["samples"] == 1
    assert main([*command, "--schedule", "0:0.5"]) == 0
    pruned = json.loads(capsys.readouterr().out)
    assert pruned["outputs"][0]["drift"] > 1e-4 and pruned["macs_ratio"] > 1.2
    assert len(pruned["seconds"][timing.EAGER]) == 2
    assert f"{folder}/none is no folder" in error(capsys, *command[:3], f"{folder}/none", *command[4:])


def test_completion_knows_commands_and_options() -> None:
    for shell in ("bash", "zsh"):
        done = subprocess.run(
            [sys.executable, "-m", "rs_compile.cli", "completion", shell], capture_output=True, text=True, check=True
        )
        assert "visualize" in done.stdout and "--img-size" in done.stdout
    # what bash offers for "rs-compile expl" and "rs-compile bench --mod"
    shell = (
        f"source <({sys.executable} -m rs_compile.cli completion bash); COMP_WORDS=(rs-compile expl); COMP_CWORD=1; "
        '_shtab_rs_compile; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["explain"]


def test_an_interrupt_is_no_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "rs-compile: interrupted\n"


def test_the_module_runs_as_a_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rs_compile.cli", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("demo", "explain", "bench", "run"))


def test_what_a_code_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "rsc-403"]) == 0
    assert capsys.readouterr().out.startswith("code: RSC-403\ntitle: An op needs every token\nmeaning: The op mixes")
    assert main(["explain", "RSC-403", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["way out"].startswith("Prune after a later block")
