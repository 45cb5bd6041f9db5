"""Question answering with UMT: the ranking against transformers' own decoder, and the command on a made-up world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from umt_world import COLOURS, FEW, TINY, tiny, train_answering, write_world

from bench.evaluate.__main__ import main
from bench.evaluate.umt.answers import answer, answer_tokens, rank
from bench.evaluate.umt.tokens import Tokens, normalised, read_tokenizer
from bench.evaluate.umt.vqa import evaluate_vqa
from bench.models.umt_tasks import UMT_SIZES, UmtAnswering
from bench.models.umt_text import AnswerDecoder
from rs_compile import optimize

COUNT = len(FEW)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("umt")
    write_world(folder, FEW, kinds=1)
    model: Any = tiny(UmtAnswering)
    train_answering(model, read_tokenizer(folder / "text", TINY.text), FEW, steps=60, kinds=1)
    torch.save({"model": model.state_dict()}, folder / "qa.pth")
    return folder


@pytest.fixture
def argv(world: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(UMT_SIZES, "b", TINY)
    monkeypatch.chdir(world)
    argv = ["vqa", "--umt", "b", "--checkpoint", "qa.pth", "--text-config", "text", "--videos", "videos"]
    argv += ["--annotations", "questions.json", "--answers", "answers.json", "--workers", "0"]
    return [*argv, "--schedule", "0:0.5,1:0.8"]


def test_answers_end_in_a_mark_unless_they_are_cut(world: Path) -> None:
    tokens = answer_tokens(read_tokenizer(world / "text", TINY.text), ["Red", "moves left", "a red disc moves left"])
    lengths = tokens.mask.sum(1).tolist()
    assert lengths == [3, 4, 5] and tokens.ids[0, 2] == tokens.ids[1, 3] == 102 and 102 not in tokens.ids[2]


@torch.no_grad()
def test_ranking_is_transformers_decoder_an_answer_at_a_time(world: Path) -> None:
    """First token twice, no mean over tokens, what is filled up not counted; the candidates by the first token."""
    tokenizer = read_tokenizer(world / "text", TINY.text)
    model: Any = tiny(UmtAnswering)
    for parameter in model.parameters():  # biases too, and answers that differ
        nn.init.normal_(parameter, std=0.3)
    decoder: AnswerDecoder = model.text_decoder.eval()
    config = transformers.BertConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=192, is_decoder=True,
        add_cross_attention=True, use_cache=False,
    )  # fmt: skip
    theirs: Any = transformers.BertLMHeadModel(config).eval()
    theirs.load_state_dict(decoder.state_dict())
    listed = [*COLOURS, "moves left", "moves right", "a red disc moves left", "a"]
    tokens = answer_tokens(tokenizer, listed)
    states, mask = torch.randn(2, 6, 48), torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]).bool()
    best, scores = rank(decoder, states, mask, tokens, 5)
    for q in range(2):
        given = {"encoder_hidden_states": states[q : q + 1], "encoder_attention_mask": mask[q : q + 1].long()}
        first, whole = [], []
        for ids, read in zip(tokens.ids, tokens.mask, strict=True):
            ids = ids[read]  # nothing is filled up here
            likely = theirs(ids.unsqueeze(0), **given).logits[0].log_softmax(-1)
            steps = [float(likely[i, ids[i + 1]]) for i in range(len(ids) - 1)]
            first.append(steps[0])
            whole.append(steps[0] + sum(steps))
        wanted = sorted(range(len(listed)), key=lambda i: -first[i])[:5]
        assert best[q].tolist() == wanted
        assert scores[q].tolist() == pytest.approx([whole[i] for i in wanted], rel=1e-4)
    # "moves left" and "moves right" have one first token: the one that the list names first stands first
    tied = [listed.index("moves left"), listed.index("moves right")]
    places = rank(decoder, states, mask, tokens, len(listed))[0][0].tolist()
    assert places.index(tied[1]) == places.index(tied[0]) + 1


@torch.no_grad()
def test_questions_of_a_video_share_it(world: Path) -> None:
    """Many at once, in parts, give what each gives alone."""
    tokenizer = read_tokenizer(world / "text", TINY.text)
    model: Any = tiny(UmtAnswering)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.eval()
    answers = answer_tokens(tokenizer, json.loads((world / "answers.json").read_text()))
    asked = Tokens.of(tokenizer, [normalised(q) for scene in FEW[:2] for q, _ in scene.questions], 25)
    video = torch.randn(30, 64)
    alone = [answer(model, asked.rows([i]), video, answers, 4)[0] for i in range(6)]
    assert answer(model, asked, video, answers, 4) == alone

    def scores(given: Tokens) -> Tensor:
        states = model.text_encoder.text(given.ids, given.mask)
        states = model.text_encoder.fuse(states, given.mask, video.unsqueeze(0))
        return rank(model.text_decoder, states, given.mask, answers, 4)[1]

    together = scores(asked)
    torch.testing.assert_close(together, torch.cat([scores(asked.rows([i])) for i in range(6)]), rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_the_whole_command(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resume = ["--resume", str(tmp_path / "r")]
    assert main([*argv, "--candidates", "11", "--json", str(tmp_path / "out.json"), *resume]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"UMT-B, {COUNT} questions on {COUNT} videos of videos, float32; pruned: 0:0.5,1:0.8"
    dense, pruned = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert lines[3].split() == ["dense", f"{dense['accuracy']:.2f}"]
    assert (dense["questions"], dense["videos"], dense["unlisted"], dense["unread"]) == (COUNT, COUNT, 0, 0)
    assert dense["accuracy"] > 60 and pruned["accuracy"] > 40  # chance: 9 among all answers, 25 among the colours
    lines = (tmp_path / "r").read_text().splitlines()
    assert len(lines) == 1 + COUNT // 4  # a header, and a line a batch; run again, nothing is left to do
    assert main([*argv, "--candidates", "11", *resume]) == 0 and (tmp_path / "r").read_text().splitlines() == lines


def test_what_is_missing(argv: list[str], tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too short a list is an error; questions on videos that cannot be read count as wrong, and are listed."""
    assert main(argv) == 2
    assert "has 11 answers, and the 128 likeliest are ranked; give the whole list" in capsys.readouterr().err
    asked = json.loads(Path("questions.json").read_text())[:3]  # of as many videos
    asked[0]["answer"] = "Red"  # letter by letter
    (tmp_path / "videos").mkdir()
    for name in {question["video"] for question in asked}:
        (tmp_path / "videos" / name).write_bytes((world / "videos" / name).read_bytes())
    (tmp_path / "videos" / asked[2]["video"]).write_bytes(b"no video")
    (tmp_path / "q.json").write_text(json.dumps(asked))
    argv[argv.index("--videos") + 1], argv[argv.index("--annotations") + 1] = (
        str(tmp_path / "videos"),
        str(tmp_path / "q.json"),
    )
    assert main([*argv, "--candidates", "5", "--json", str(tmp_path / "out.json")]) == 1
    said = capsys.readouterr()
    assert "1 of 3 questions have an answer that is not in answers.json: wrong" in said.out
    assert "1 of 3 questions are on videos that could not be read: wrong" in said.out
    assert f"left out, as they could not be read: 1\n  {asked[2]['video']}" in said.err
    row = json.loads((tmp_path / "out.json").read_text())["rows"][0]
    assert row["accuracy"] <= 100 / 3 and (row["questions"], row["videos"], row["unread"]) == (3, 2, 1)
    (tmp_path / "videos" / asked[0]["video"]).unlink()
    assert main([*argv, "--candidates", "5"]) == 2
    assert (
        f"has questions for videos that are not in {tmp_path / 'videos'}: {asked[0]['video']}"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_small_umt_learns_to_answer(tmp_path: Path) -> None:
    """A minute: colours, shapes and ways."""
    write_world(tmp_path, FEW)
    model: Any = tiny(UmtAnswering)
    tokenizer = read_tokenizer(tmp_path / "text", TINY.text)
    train_answering(model, tokenizer, FEW, steps=400)
    encoder = model.vision_encoder.encoder
    pruned = optimize(encoder, {0: 0.9, 1: 0.9}, backend="eager", token_outputs="compact")
    files = (tmp_path / name for name in ("videos", "questions.json", "answers.json"))
    scores = evaluate_vqa(model, {"dense": encoder, "pruned": pruned}, tokenizer, *files, candidates=11, workers=0)
    found = {name: score.accuracy for name, score in scores.items()}
    assert found["dense"] > 45 and found["pruned"] > 40, found  # chance: 9; 28 by the kind of question
