"""Retrieval with UMT: the whole command on a made-up world, and its re-ranking against pairs worked one by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from umt_world import FEW, TINY, Scene, scenes, tiny, train_retrieval, write_world

from bench.evaluate.__main__ import main
from bench.evaluate.recall import Found
from bench.evaluate.umt import retrieval
from bench.evaluate.umt.datasets import DATASETS, read_captions
from bench.evaluate.umt.pixels import Clips
from bench.evaluate.umt.rerank import shortlists
from bench.evaluate.umt.retrieval import UmtScores, evaluate_umt_retrieval
from bench.evaluate.umt.tokens import Tokenizer, Tokens, read_tokenizer
from bench.models.umt_tasks import UMT_SIZES, UmtRetrieval
from rs_compile import optimize

PRUNED = {0: 0.5, 1: 0.8}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, captions, tokenizer, and a checkpoint that knows them a little."""
    folder = tmp_path_factory.mktemp("umt")
    write_world(folder, FEW)
    model: Any = tiny(UmtRetrieval)
    train_retrieval(model, read_tokenizer(folder / "text", TINY.text), FEW, steps=60, batch=12, rate=3e-3)
    torch.save({"model": model.state_dict()}, folder / "umt.pth")
    return folder


@pytest.fixture
def argv(world: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(UMT_SIZES, "b", TINY)
    argv = ["retrieval", "--umt", "b", "--checkpoint", "umt.pth", "--text-config", "text", "--dataset", "msrvtt"]
    argv += ["--videos", "videos", "--annotations", "captions.json", "--workers", "0", "--schedule", "0:0.5,1:0.8"]
    monkeypatch.chdir(world)
    return argv


def test_the_whole_command(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small UMT after 60 steps finds the videos of captions well above chance, re-ranked and not, pruned and not."""
    assert main([*argv, "--json", str(tmp_path / "out.json"), "--resume", str(tmp_path / "cache")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("UMT-B on MSRVTT, 12 videos of videos, 12 texts, float32; pruned: 0:0.5,1:0.8")
    ways = ["text to video", "video to text", "arithmetic mean", "harmonic mean", "mean, not re-ranked"]
    assert [line[8:28].strip() for line in lines[3:13]] == 2 * ways
    dense, pruned = json.loads((tmp_path / "out.json").read_text())["rows"]
    chance = 100 / 12
    for row in (dense, pruned):
        assert row["arithmetic"]["r1"] == (row["text_to_video"]["r1"] + row["video_to_text"]["r1"]) / 2
        assert row["pooling"] == "tokens" and row["videos"] == row["captions"] == 12
    assert dense["arithmetic"]["r1"] > 4 * chance and dense["by_similarity"]["arithmetic"]["r1"] > 4 * chance
    assert pruned["arithmetic"]["r1"] > 2 * chance and pruned != dense
    # gigabytes at the published size: gone when the scores are there
    assert sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()) == ["scores.json", "scores.json"]
    assert lines[3].split()[-3:] == [f"{dense['text_to_video'][k]:.1f}" for k in ("r1", "r5", "r10")]


@pytest.fixture(scope="module")
def loaded(world: Path) -> tuple[UmtRetrieval, Tokenizer, dict[str, Any]]:
    model: Any = tiny(UmtRetrieval)
    model.load_state_dict(torch.load(world / "umt.pth")["model"])
    dense = model.eval().vision_encoder.encoder
    pruned = optimize(dense, PRUNED, backend="eager", token_outputs="compact")
    return model, read_tokenizer(world / "text", TINY.text), {"dense": dense, "pruned": pruned}


@pytest.fixture(scope="module")
def evaluate(world: Path, loaded: Any) -> Callable[..., dict[str, UmtScores]]:
    model, tokenizer, encoders = loaded

    def run(given: Any = None, **options: Any) -> dict[str, UmtScores]:
        files = world / "videos", world / "captions.json"
        options = {"workers": 0, **options}
        return evaluate_umt_retrieval(model, given or encoders, tokenizer, DATASETS["MSRVTT"], *files, **options)

    return run


def by_sorting(to_videos: Tensor, to_texts: Tensor) -> list[float]:
    """R@1 of text i and video i belonging together, both ways."""
    ranks = [[int((row > row[i]).sum()) for i, row in enumerate(scores)] for scores in (to_videos, to_texts.T)]
    return [100 * sum(rank < 1 for rank in way) / len(way) for way in ranks]


@torch.no_grad()
def test_re_ranking_is_that_of_pairs_one_by_one(world: Path, loaded: Any, evaluate: Any) -> None:
    """As published: texts filled up to their most tokens, a text and a video at once, the raw logit."""
    model, tokenizer, encoders = loaded
    captions = read_captions(world / "captions.json", DATASETS["MSRVTT"])
    clips = torch.stack([Clips(world / "videos", tuple(captions.videos), 4, 64)(i) for i in range(12)])
    tokens = Tokens.of(tokenizer, captions.texts, 32)
    ids = torch.nn.functional.pad(tokens.ids, (0, 32 - tokens.ids.shape[1]))
    text, mask = model.text_encoder.text(ids, ids != 0), ids != 0
    short, whole = evaluate(shortlist=3), evaluate()
    for name, videos in (("dense", encoders["dense"](clips)), ("pruned", encoders["pruned"](clips).tokens)):
        assert videos.shape[1] == (64 if name == "dense" else 26)  # 64 -> 32 -> 26, and no more than these are read
        similarity = model.projected(text) @ model.pooled(videos).T
        rows = [
            [model.matching(t, m, video) for video in videos.split(1)]
            for t, m in zip(text.split(1), mask.split(1), strict=True)
        ]
        logits = torch.tensor(rows)
        for scores, most in ((short, 3), (whole, 12)):
            to_videos, to_texts = torch.full((12, 12), -100.0), torch.full((12, 12), -100.0)
            for t in range(12):
                best = similarity[t].topk(most).indices
                to_videos[t, best] = logits[t, best]
                best = similarity[:, t].topk(most).indices
                to_texts[best, t] = logits[best, t]
            found, similar = scores[name], scores[name].by_similarity
            r1 = [found.text_to_video.r1, found.video_to_text.r1]
            assert r1 == pytest.approx(by_sorting(to_videos, to_texts))
            r1 = [similar.text_to_video.r1, similar.video_to_text.r1]
            assert r1 == pytest.approx(by_sorting(similarity, similarity))


def test_shortlists_go_by_row_and_by_column() -> None:
    similarity = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.6, 0.5], [0.2, 0.9, 0.3]])
    of_texts, of_videos = shortlists(similarity, 1)
    assert of_texts.tolist() == [[True, False, False], [True, False, False], [False, True, False]]
    assert of_videos.tolist() == [[True, False, False], [False, False, True], [False, True, False]]
    everything, too = shortlists(similarity, 128)
    assert everything.all() and too.all()


def test_frames_are_pooled_alone_where_nothing_is_pruned(evaluate: Any) -> None:
    tokens, frames = evaluate(), evaluate(per_frame=True)
    assert (frames["dense"].pooling, frames["pruned"].pooling) == ("frames", "tokens")
    assert frames["pruned"] == tokens["pruned"]
    # every pair is re-ranked here, whatever its similarity
    assert vars(frames["dense"])["text_to_video"] == tokens["dense"].text_to_video


class Stops:
    """An encoder that stops after some batches."""

    def __init__(self, encoder: Any, batches: int) -> None:
        self.encoder, self.left = encoder, batches

    def __call__(self, clips: Tensor) -> Tensor:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        tokens: Tensor = self.encoder(clips)
        return tokens


def test_an_interrupted_evaluation_goes_on(
    loaded: Any, evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = loaded[2]["dense"]
    whole = evaluate({"dense": encoder})
    with pytest.raises(KeyboardInterrupt):
        evaluate({"dense": Stops(encoder, 2)}, cache=tmp_path)
    left = Stops(encoder, 1)  # one batch of three
    fused: list[int] = []
    match = retrieval.match

    def stopping(*arguments: Any) -> Tensor:
        if len(fused) == 5:
            raise KeyboardInterrupt
        fused.append(1)
        return match(*arguments)

    monkeypatch.setattr(retrieval, "match", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate({"dense": left}, cache=tmp_path)
    assert left.left == 0 and len(fused) == 5
    monkeypatch.setattr(retrieval, "match", lambda *a: (fused.append(1), match(*a))[1])
    assert evaluate({"dense": Stops(encoder, 0)}, cache=tmp_path) == whole and len(fused) == 12
    # done, and so is a part of another comparison
    monkeypatch.setattr(retrieval, "match", None)
    assert evaluate({"dense": Stops(encoder, 0)}, cache=tmp_path) == whole
    monkeypatch.setattr(retrieval, "match", match)
    both = evaluate({"dense": Stops(encoder, 0), "other": encoder}, cache=tmp_path)
    assert both["dense"] == both["other"] == whole["dense"]


def test_videos_that_cannot_be_read_are_named(
    argv: list[str], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_world(tmp_path / "other", FEW[:6])
    os.chdir(tmp_path / "other")
    argv[argv.index("umt.pth")] = str(world / "umt.pth")
    (tmp_path / "other" / "videos" / FEW[2].name).write_bytes(b"no video")
    assert main([*argv, "--json", "out.json"]) == 1
    said = capsys.readouterr()
    assert "5 videos of videos, 5 texts" in said.out
    assert f"left out, as they could not be read: 1\n  {FEW[2].name}: Invalid data" in said.err
    row = json.loads(Path("out.json").read_text())["rows"][0]
    assert row["videos"] == 5 and [s["file"] for s in row["skipped"]] == [FEW[2].name]
    for scene in FEW[:6]:
        (tmp_path / "other" / "videos" / scene.name).write_bytes(b"no video")
    assert main(argv) == 2 and "none of the 6 videos in videos could be read; the first" in capsys.readouterr().err
    (tmp_path / "other" / "videos" / FEW[4].name).unlink()
    assert main(argv) == 2
    assert f"has captions for videos that are not in videos: {FEW[4].name}" in capsys.readouterr().err


def test_what_the_command_refuses(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*more: str, without: str = "") -> str:
        given = list(argv)
        if without:
            at = given.index(without)
            del given[at : at + 2]
        assert main([*given, *more]) == 2
        return capsys.readouterr().err

    assert "UMT takes --text-config too" in error(without="--text-config")
    assert "UMT takes --checkpoint (or --random-weights) too" in error(without="--checkpoint")
    assert "--captions and --frames go with --encoder; UMT takes --annotations, and 4 frames" in error("--frames", "8")
    (tmp_path / "file").touch()
    assert "is no folder and cannot be made one (File exists)" in error("--resume", str(tmp_path / "file"))
    encoder = ["retrieval", "--encoder", "x", "--videos", "videos"]
    assert main([*encoder, "--annotations", "a"]) == 2
    assert "--annotations goes with --umt, not with --encoder" in capsys.readouterr().err
    assert main(encoder) == 2 and "--encoder takes --captions FILE too" in capsys.readouterr().err
    assert main([*argv[:3], *argv[5:], "--random-weights", "--limit", "3"]) == 0
    assert "random weights: this shows that it runs" in capsys.readouterr().out


SCRIPT = """
import sys
from umt_world import TINY
from bench.evaluate.__main__ import main
from bench.models.umt_tasks import UMT_SIZES
UMT_SIZES["b"] = TINY
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_under_torchrun(argv: list[str], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(tmp_path / "script.py"), *argv, "--resume", str(tmp_path / "cache"), "--json"]
    done = subprocess.run([*command, str(tmp_path / "two.json")], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("UMT-B on MSRVTT") == 1
    assert main([*argv, "--json", str(tmp_path / "one.json")]) == 0
    one, two = (json.loads((tmp_path / name).read_text())["rows"] for name in ("one.json", "two.json"))
    assert one == two


@pytest.mark.slow
def test_a_small_umt_learns_its_world(tmp_path: Path) -> None:
    """A minute or two: all 48 scenes, told apart by colour, shape and way, on other photographs than it was shown."""
    shown: list[Scene] = scenes()
    write_world(tmp_path, shown)
    model: Any = tiny(UmtRetrieval)
    tokenizer = read_tokenizer(tmp_path / "text", TINY.text)
    train_retrieval(model, tokenizer, shown, steps=600, batch=24, rate=2e-3)
    encoder = model.vision_encoder.encoder
    keep = {0: 0.8, 1: 0.8}
    encoders = {"dense": encoder, "pruned": optimize(encoder, keep, backend="eager", token_outputs="compact")}
    files = tmp_path / "videos", tmp_path / "captions.json"
    scores: dict[str, Found] = dict(
        evaluate_umt_retrieval(model, encoders, tokenizer, DATASETS["MSRVTT"], *files, workers=0)
    )
    found = {name: score.arithmetic.r1 for name, score in scores.items()}
    assert found["dense"] > 12 and found["pruned"] > 8, found  # chance: 2.1
