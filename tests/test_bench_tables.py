"""`python -m bench`: rows, columns, JSON, resuming and error texts, on the stand-ins of --quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from PIL import Image
from umt_world import scenes, write_world

from bench.__main__ import COMMANDS, main, summary
from bench.digits import load_digits, load_pretrained_digits_vit
from bench.tables import measure, table2, table4, table5
from bench.tables.methods import dense, pruned, with_attention
from bench.tables.one_layer import deit_s, umt_b
from bench.tables.subjects import deit, umt_encoder
from rs_compile import ClassAttention, Lowest, MeanAttention, Random, Schedule, Shift
from rs_compile.schedule import removed

QUICK = ["--quick", "--rounds", "1", "--batch-size", "2"]


def saved(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The words of a refusal, by argparse or by the command."""
    try:
        assert main(list(argv)) == 2
    except SystemExit as end:
        assert end.code == 2
    return capsys.readouterr().err


TABLES = ("table1", "table2", "table4", "table5", "table8", "figure1", "figure3", "figure5")


@pytest.mark.parametrize("command", TABLES)
def test_every_table_has_the_shared_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for option in ("--json", "--quick", "--columns", "--device", "--dtype", "--batch-size", "--rounds"):
        assert option in text
    assert "--baseline-eager-everywhere" in text and summary(COMMANDS[command])[:7].lower() in text.lower()


def test_gflops_of_all_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    assert main(["table2", "--quick", "--columns", "gflops", "--models", "UMT-B", "--json", str(file)]) == 0
    rows = saved(file)
    methods = ["base", "base-sdpa", "base-compiled", "attention", "random", "lowest", "ours"]
    assert [(row["model"], row["method"]) for row in rows] == [("UMT-B", method) for method in methods]
    bases = {row["gflops"] for row in rows if row["method"].startswith("base")}
    rest = {row["gflops"] for row in rows if not row["method"].startswith("base")}
    assert len(bases) == len(rest) == 1 and max(rest) < min(bases)
    assert not any("throughput" in row or "accuracy" in row for row in rows)
    out = capsys.readouterr().out
    heads = out.splitlines()[0].split()
    # stand-ins have no figures of the paper beside them
    assert heads == ["model", "method", "GFLOPs"] and "numbers that mean nothing" in out


def test_throughput_and_accuracy_and_resuming(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["table5", *QUICK, "--models", "DeiT-T", "--methods", "base,ours", "--json", str(tmp_path / "rows.json")]
    assert main(argv) == 0
    table = capsys.readouterr().out
    base, ours, digits, digits_ours = saved(tmp_path / "rows.json")
    assert [base["model"], digits["model"]] == ["DeiT-T", "digits ViT"]
    for row in (base, ours):
        assert row["throughput"] > 0 and row["speedup"] > 0 and "accuracy" not in row
    assert base["speedup"] == 1 and ours["gflops"] < base["gflops"]
    assert ours["speedup"] == pytest.approx(base["rounds_seconds"][0] / ours["rounds_seconds"][0])
    images, labels = load_digits("test")
    expected = load_pretrained_digits_vit()(images[:100]).argmax(1) == labels[:100]
    assert digits["accuracy"] == 100 * float(expected.double().mean()) and digits_ours["images"] == 100
    assert "digits ViT on 100 digits, as no data was given" in table
    # a stand-in's row has a name of its own, and no time that would be taken for the model's
    assert table.count("stand-in for DeiT-T") == 2 and "img/s" not in table and "speed-up" not in table

    def never(*_: Any) -> Any:
        raise AssertionError("measured again")

    for name in ("plan", "plans", "interleaved"):
        monkeypatch.setattr(measure, name, never)
    assert main(argv) == 0
    assert capsys.readouterr().out == table
    with pytest.raises(AssertionError, match="measured again"):
        main([*argv, "--methods", "base,ours,random"])


def test_a_file_of_other_settings_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    argv = ["table1", "--quick", "--columns", "gflops", "--models", "DeiT-S", "--json", str(file)]
    assert main(argv) == 0
    before = file.read_text()
    capsys.readouterr()
    assert "another setting (dtype float32 there, bfloat16 here); give another" in error(
        capsys, *argv, "--dtype", "bfloat16"
    )
    assert file.read_text() == before
    file.write_text("[]")
    assert "exists and is no result of this command; give another --json file" in error(capsys, *argv)
    argv[-1] = str(tmp_path / "no" / "rows.json")
    assert "no file can be written there; give one in a directory that exists" in error(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("table5", "--columns", "gflops,speed"), "'speed' is none of gflops, throughput, accuracy"),
        (("table5", "--methods", "our"), "'our' is none of base, base-sdpa"),
        (("table2", "--models", "DeiT-S"), "'DeiT-S' is none of UMT-B, UMT-L"),
        (("table5", "--rounds", "0"), "'0' is not an integer of at least 1"),
        (("table5", "--checkpoint", "weights.pth"), "is not MODEL=FILE, like DeiT-S=deit_small.pth"),
        (("table1", "--device", "abacus"), "--device abacus cannot be used here"),
        (("table8", "--blocks", "-1"), "write numbers from 0 on, 0,2,4"),
        (("table8", "--quick", "--blocks", "9"), "the schedule names block 9, but the model has 6 blocks, 0 to 5"),
        (("figure1", "--keeps", "80"), "are no keep ratios; write numbers above 0 and at most 1"),
        (("figure3", "--out", "plot.txt"), "--out plot.txt: write a name that ends in .png"),
        (("figure5", "--out", "no/such/plot.png"), "no file can be written there"),
        (("table5", "--quick", "--imagenet", "no/such"), "--imagenet no/such: there is no such folder"),
        (("table5", "--checkpoint", "DeiT-S=no/such.pth"), "there is no file no/such.pth"),
        (("table2", "--videos", "."), "--videos DIR goes with --captions or --annotations FILE"),
    ],
)
def test_words_of_refusals(argv: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    extra = () if argv[0] in ("table8", "figure1", "figure3", "figure5") else ("--models", "DeiT-S")
    extra = extra if "--models" not in argv and argv[0] != "table2" else ()
    columns = () if "--columns" in argv else ("--columns", "accuracy")
    assert words in error(capsys, *argv, *extra, *columns)


def test_both_halves_are_those_of_the_oracle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table8", "--quick", "--blocks", "1", "--json", str(tmp_path / "rows.json")]) == 0
    rows = {row["method"]: row for row in saved(tmp_path / "rows.json")}
    assert set(rows) == {"base", "top half", "bottom half"} and rows["top half"]["block"] == 1
    model, (images, labels) = load_pretrained_digits_vit(), load_digits("test")
    for method, lowest in (("top half", False), ("bottom half", True)):
        # 50 of 101 tokens leave, so that half of the 100 patches stays
        pruning = oracle.Pruning({1: 0.5}, protected=1, lowest=lowest)
        with torch.no_grad():
            logits = oracle.timm_vit(model, images[:100], pruning).outputs["output"]
        right = float((logits.argmax(1) == labels[:100]).double().mean())
        assert rows[method]["accuracy"] == pytest.approx(100 * right)
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["kept", "L1", "L2", "L3", "L5", "L7", "L9", "L11", "mean"]
    assert lines[3].split() == ["paper", "top", "half", "76.3", "76.1", "78.5", "79.4", "78.5", "78.9", "78.0"]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "curves"), [("figure3", 4), pytest.param("figure5", 9, marks=pytest.mark.slow)])
def test_one_block_at_a_time(command: str, curves: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "plot.png", tmp_path / "rows.json"
    assert main([command, "--quick", "--blocks", "2", "--out", str(out), "--json", str(file)]) == 0
    rows = saved(file)
    assert len(rows) == 1 + curves and {row.get("block") for row in rows} == {None, 2}
    assert all({"model", "method", "gflops", "accuracy"} <= row.keys() for row in rows)
    with Image.open(out) as picture:
        assert min(picture.size) > 300
    assert "80 of 101 tokens leave after one block." in capsys.readouterr().out


@pytest.mark.slow
def test_the_trade_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "plot.png", tmp_path / "rows.json"
    argv = ["figure1", "--quick", "--columns", "accuracy", "--curves", "ours", "--keeps", "0.8,0.5"]
    assert main([*argv, "--out", str(out), "--json", str(file)]) == 0
    rows = saved(file)
    ours = {row["keep"]: row for row in rows if row["method"] == "ours"}
    assert set(ours) == {0.8, 0.5} and ours[0.5]["gflops"] < ours[0.8]["gflops"] < rows[0]["gflops"]
    assert all(row["accuracy"] > 0 for row in rows)
    assert out.stat().st_size > 1000
    # the mean of the seven R@1 that table 2 prints for UMT-L, ours
    assert "62.6" in capsys.readouterr().out


def test_pictures_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(random.integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_text("no picture")
    argv = ["table5", *QUICK, "--columns", "accuracy", "--models", "DeiT-T", "--methods", "base,ours"]
    assert main([*argv, "--imagenet", str(tmp_path), "--workers", "0", "--json", str(tmp_path / "rows.json")]) == 1
    base, ours = saved(tmp_path / "rows.json")
    assert base["agreement"] == 100 and base["accuracy"] is None and ours["images"] == 3
    assert ours["kl"] > 0 and ours["cosine"] < 1
    captured = capsys.readouterr()
    assert "broken.png: " in captured.err and "which has no class folders" in captured.out


def test_retrieval_fills_the_accuracy_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stand-ins for UMT-B whole on a made-up world: each method on the tokens that it leaves."""
    write_world(tmp_path, scenes()[:3])
    files = ["--videos", str(tmp_path / "videos"), "--annotations", str(tmp_path / "captions.json"), "--workers", "0"]
    argv = [*QUICK, "--columns", "accuracy", "--models", "UMT-B", "--json", str(tmp_path / "2.json"), *files]
    table = ["table2", *argv, "--methods", "base,ours"]
    assert "--annotations needs --dataset NAME" in error(capsys, *table)
    table += ["--dataset", "msrvtt"]
    assert "UMT-B reads texts; pass --text-config UMT-B=DIR" in error(capsys, *table)
    text = ["--text-config", f"UMT-B={tmp_path / 'text'}"]
    without = [argument for argument in [*table, *text] if argument != "--quick"]
    assert "without its weights UMT-B finds nothing; pass --checkpoint UMT-B=FILE" in error(capsys, *without)
    assert main([*table, *text]) == 0
    rows = saved(tmp_path / "2.json")
    assert [row["method"] for row in rows] == ["base", "ours"]
    for row in rows:
        assert row["images"] == row["captions"] == 3 and row["arithmetic"]["r5"] == 100
        assert row["accuracy"] == (row["text_to_video"]["r1"] + row["video_to_text"]["r1"]) / 2
    assert "R@1 in %, arithmetic mean of both directions, 3 videos" in capsys.readouterr().out


@pytest.mark.slow
def test_answers_fill_the_accuracy_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_world(tmp_path, scenes()[:3])
    argv = ["table4", *QUICK, "--columns", "accuracy", "--models", "UMT-B", "--json", str(tmp_path / "rows.json")]
    argv += ["--videos", str(tmp_path / "videos"), "--annotations", str(tmp_path / "questions.json"), "--workers", "0"]
    argv += ["--text-config", f"UMT-B={tmp_path / 'text'}", "--dataset", "msvd-qa", "--methods", "base,attention,ours"]
    assert "--annotations needs --answers FILE" in error(capsys, *argv)
    argv += ["--answers", str(tmp_path / "answers.json")]
    assert "has 11 answers, and the 128 likeliest are ranked" in error(capsys, *argv)
    assert main([*argv, "--candidates", "11"]) == 0
    rows = saved(tmp_path / "rows.json")
    assert [(row["method"], row["questions"], row["images"]) for row in rows] == [
        (method, 9, 3) for method in ("base", "attention", "ours")
    ]
    assert all(0 <= row["accuracy"] <= 100 for row in rows)
    assert "accuracy: of answers in %, 9 questions on 3 videos" in capsys.readouterr().out


@pytest.mark.slow
def test_retrieval_with_merged_tokens(tmp_path: Path) -> None:
    write_world(tmp_path, scenes()[:3])
    argv = ["table3", *QUICK, "--columns", "accuracy", "--models", "UMT-B", "--json", str(tmp_path / "rows.json")]
    argv += ["--videos", str(tmp_path / "videos"), "--annotations", str(tmp_path / "captions.json"), "--workers", "0"]
    argv += ["--text-config", f"UMT-B={tmp_path / 'text'}", "--dataset", "MSRVTT"]
    assert main([*argv, "--methods", "base,vid-tldr,vid-tldr-shift,ward"]) == 0
    base, *rows = saved(tmp_path / "rows.json")
    assert [row["method"] for row in rows] == ["vid-tldr", "vid-tldr-shift", "ward"] and base["images"] == 3
    assert all(row["dataset"] == "MSRVTT" and row["images"] == 3 for row in rows)


def test_methods_are_the_models_own_and_schedules() -> None:
    subject = deit("DeiT-S", (0, 3, 6), 0.8, {}, quick=True)
    assert pruned("attention", subject.keep, subject.attention).schedule == Schedule(
        {0: 0.8, 3: 0.8, 6: 0.8}, score=ClassAttention()
    )
    assert umt_encoder("UMT-B", (0,), 0.8, {}, quick=True, qa=False).attention == MeanAttention()
    assert pruned("lowest", subject.keep, Random()).schedule == Schedule(subject.keep, score=Lowest())
    everywhere = pruned("attention", subject.keep, ClassAttention(), eager_everywhere=True)
    assert everywhere.options == {"explicit_attention": True}
    assert not pruned("ours", subject.keep, ClassAttention(), eager_everywhere=True).options
    assert [(m.fused, m.compiled) for m in map(dense, ("base", "base-sdpa", "base-compiled"))] == [
        (False, False),
        (True, False),
        (True, True),
    ]


@pytest.mark.parametrize("subject", [deit("DeiT-T", (), 1, {}, True), umt_encoder("UMT-B", (), 1, {}, True, qa=True)])
def test_attention_of_the_base(subject: Any) -> None:
    model = subject.make(False, None)
    sample = torch.randn(1, *subject.shape)
    for fused in (True, False):
        twin = with_attention(model, fused)
        assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
            twin(sample)
        names = {event.key for event in profile.key_averages()}
        assert ("aten::scaled_dot_product_attention" in names) == fused
        assert ("aten::softmax" in names) != fused


def test_as_many_tokens_leave_as_the_paper_says() -> None:
    for study, block in ((deit_s(40, (0,)), 0), (deit_s(98, (0,)), 4), (umt_b(1100, (0,)), 2)):
        schedule = study.method("ours", block, Shift()).schedule
        assert schedule is not None and removed(study.tokens, schedule.keep[block]) == study.leave


def test_figures_of_the_paper() -> None:
    """A few of each table, read off its text again."""
    assert table2.paper("UMT-B", "MSRVTT")["ours"] == {"gflops": 156.4, "throughput": 175, "accuracy": 48.0}
    assert table2.paper("UMT-L", "ActivityNet")["attention"] == {"gflops": 478.5, "throughput": 23, "accuracy": 53.2}
    assert table2.paper("UMT-L", "SSV2-template")["base"] == {"gflops": 984.6, "throughput": 12, "accuracy": 78.4}
    assert table4.paper("UMT-B", "MSVD-QA")["ours"] == {"gflops": 217.7, "throughput": 128, "accuracy": 47.0}
    assert table4.paper("UMT-L", "MSRVTT-QA")["attention"] == {"gflops": 690.5, "throughput": 15, "accuracy": 49.5}
    assert table5.paper("DeiT-B")["ours"] == {"gflops": 11.5, "throughput": 2428, "accuracy": 79.6}
    assert table5.paper("DeiT-T")["attention"] == {"gflops": 0.8, "throughput": 10949, "accuracy": 65.5}


@pytest.mark.slow
def test_published_gflops_through_the_commands(tmp_path: Path) -> None:
    expected = {
        "table2": {"UMT-B": (303.343, 156.400), "UMT-L": (984.624, 478.487)},
        "table4": {"UMT-B": (303.343, 217.662), "UMT-L": (984.624, 690.538)},
        "table5": {"DeiT-T": (1.258, 0.805), "DeiT-S": (4.608, 2.993), "DeiT-B": (17.583, 11.513)},
    }
    for command, models in expected.items():
        file = tmp_path / f"{command}.json"
        assert main([command, "--columns", "gflops", "--methods", "base,attention,ours", "--json", str(file)]) == 0
        got = {(row["model"], row["method"]): round(row["gflops"], 3) for row in saved(file)}
        for model, (base, less) in models.items():
            assert [got[model, m] for m in ("base", "attention", "ours")] == [base, less, less]
