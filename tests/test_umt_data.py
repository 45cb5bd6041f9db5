"""What UMT reads: texts, tokens, annotation files, frames and pixels, each of the published protocol's traps."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from umt_world import LENGTH, TINY, Scene, filmed, photographs, write_video, write_vocabulary

from bench.evaluate.annotations import check_present
from bench.evaluate.frames import middles
from bench.evaluate.journal import EvaluationError
from bench.evaluate.umt.datasets import DATASETS, Question, read_answers, read_captions, read_questions
from bench.evaluate.umt.pixels import Clips, prepared
from bench.evaluate.umt.tokens import Tokenizer, Tokens, normalised, read_tokenizer
from bench.tables import table2, table3
from bench.tables.options import RETRIEVAL
from rs_compile.arguments import add_dataset


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("umt") / "text"
    write_vocabulary(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(vocabulary: Path) -> Tokenizer:
    return read_tokenizer(vocabulary, TINY.text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A man, in Paris.", "a man in paris"),
        ("it's 'so' \"good\"! (really?) *yes* #1: a; b ~", "its so good really yes 1 a b"),
        ("a well-known/used   thing", "a well known used thing"),
        ("<person> walks", "person walks"),
        ("  - a -  ", "a"),
        ("50% & more_than $1", "50% & more_than $1"),
    ],
)
def test_normalised_texts(text: str, wanted: str) -> None:
    assert normalised(text) == wanted


def test_cls_goes_in_and_sep_does_not(tokenizer: Tokenizer, vocabulary: Path) -> None:
    """A stock tokenizer puts [SEP] behind."""
    stock = transformers.BertTokenizer.from_pretrained(vocabulary)
    texts = ["a red disc moves left", "a bar"]
    tokens = Tokens.of(tokenizer, texts, 32)
    assert stock(texts[1])["input_ids"] == [101, *tokens.ids[1, 1:3].tolist(), 102]
    assert tokens.ids[:, 0].tolist() == [101, 101] and 102 not in tokens.ids
    assert tokens.ids.shape == (2, 6) and tokens.ids[1, 3:].tolist() == [0, 0, 0]
    assert tokens.mask.tolist() == [[True] * 6, [True] * 3 + [False] * 3]


def test_cls_counts_among_the_most_tokens(tokenizer: Tokenizer) -> None:
    tokens = Tokens.of(tokenizer, ["a red disc moves left", "nothing known"], 4)
    assert tokens.ids.shape == (2, 4) and tokens.ids[1].tolist() == [101, 100, 100, 0]
    # an answer's end mark, which is cut off like any token
    answers = Tokens.of(tokenizer, ["red [SEP]", "a red disc moves left [SEP]"], 5)
    assert answers.ids[0].tolist() == [101, int(answers.ids[1, 2]), 102, 0, 0] and 102 not in answers.ids[1]


def test_tokenizers_that_are_not_umts(vocabulary: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"there is no folder .*nowhere; give bert-base-uncased's"):
        read_tokenizer(tmp_path / "nowhere", TINY.text)
    words = (vocabulary / "vocab.txt").read_text().splitlines()
    for name, lines, told in (
        ("short", words[:-1], "it has tokens 30521 for 30522"),
        ("moved", [*words[:101], words[102], words[101], *words[103:]], r"\[CLS\] 102 for 101, \[SEP\] 101 for 102"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text("\n".join(lines))
        with pytest.raises(EvaluationError, match=told):
            read_tokenizer(tmp_path / name, TINY.text)
    cased = transformers.BertTokenizer.from_pretrained(vocabulary, do_lower_case=False)
    cased.save_pretrained(tmp_path / "cased")
    with pytest.raises(EvaluationError, match="it has cased True for False"):
        read_tokenizer(tmp_path / "cased", TINY.text)
    (tmp_path / "none").mkdir()
    with pytest.raises(EvaluationError, match=r"none is not UMT's|none cannot be read"):
        read_tokenizer(tmp_path / "none", TINY.text)


def test_a_configuration_of_another_text_model(vocabulary: Path) -> None:
    config = vocabulary / "config.json"
    try:
        config.write_text(json.dumps({"hidden_size": 48, "vocab_size": 30522, "fusion_layer": 2, "other": 1}))
        assert read_tokenizer(vocabulary, TINY.text)
        config.write_text(json.dumps({"hidden_size": 1024, "num_hidden_layers": 24}))
        with pytest.raises(EvaluationError, match=r"hidden_size 1024 for 48, num_hidden_layers 24 for 3; UMT-B takes"):
            read_tokenizer(vocabulary, TINY.text)
    finally:
        config.unlink()


def annotations(tmp_path: Path, content: Any) -> Path:
    (tmp_path / "a.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path / "a.json"


def test_lengths_by_data_set() -> None:
    assert tuple(DATASETS) == RETRIEVAL == tuple(table2.RECALL) == tuple(table3.PRINTED)
    assert {name: d.tokens for name, d in DATASETS.items()} == {
        "MSRVTT": 32, "MSVD": 64, "ActivityNet": 150, "DiDeMo": 64, "LSMDC": 96, "SSV2-label": 25, "SSV2-template": 25
    }  # fmt: skip
    assert {name for name, d in DATASETS.items() if d.paragraph} == {"ActivityNet", "DiDeMo"}
    assert {name: d.seconds for name, d in DATASETS.items() if d.seconds} == {"DiDeMo": 30}


def test_captions_of_a_list_are_queries_or_one_paragraph(tmp_path: Path) -> None:
    """MSVD's must not be joined: UMT's earlier, inflated results."""
    path = annotations(tmp_path, [{"video": "a", "caption": ["One. ", "Two"]}, {"video": "b", "caption": "Three!"}])
    msvd = read_captions(path, DATASETS["MSVD"])
    assert (msvd.texts, msvd.videos) == (["one", "two", "three"], ["a", "b"])
    assert msvd.pairs == [(0, 0), (1, 0), (2, 1)]
    whole = read_captions(path, DATASETS["ActivityNet"])
    assert (whole.texts, whole.pairs) == (["one two", "three"], [(0, 0), (1, 1)])


def test_several_videos_of_a_text(tmp_path: Path) -> None:
    content = [
        {"caption": "moving [something]", "video": ["1.webm", "2.webm"]},
        {"caption": "x", "video": "3.webm"},
        {"caption": "y", "video": ["2.webm", "2.webm"]},
    ]
    found = read_captions(annotations(tmp_path, content), DATASETS["SSV2-template"])
    assert found.videos == ["1.webm", "2.webm", "3.webm"]
    assert found.pairs == [(0, 0), (0, 1), (1, 2), (2, 1)]
    left = found.of_videos([1, 2])
    assert left.videos == ["2.webm", "3.webm"] and left.texts == ["moving [something]", "x", "y"]
    assert left.pairs == [(0, 0), (1, 1), (2, 0)]
    alone = found.of_videos([2])
    assert (alone.videos, alone.texts, alone.pairs) == (["3.webm"], ["x"], [(0, 0)])


def test_a_limit_keeps_the_texts_of_its_videos(tmp_path: Path) -> None:
    content = [{"video": f"{i}", "caption": [f"t{i}", f"u{i}"]} for i in range(6)]
    found = read_captions(annotations(tmp_path, content), DATASETS["MSVD"], limit=2)
    assert found.videos == ["0", "3"] and found.texts == ["t0", "u0", "t3", "u3"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", r"is no JSON"),
        ({}, "is no list of annotations"),
        ([], "is no list of annotations"),
        ([1], "entry 0: 1 is no annotation"),
        ([{"caption": "x"}], "entry 0 has None for its video"),
        ([{"video": "a", "caption": "x"}, {"video": "a", "caption": []}], r"entry 1 has \[\] for its caption"),
        ([{"video": ["a", " "], "caption": "x"}], "entry 0 has .* for its video; write"),
    ],
)
def test_annotations_that_are_none(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        read_captions(annotations(tmp_path, content), DATASETS["MSRVTT"])


def test_questions(tmp_path: Path) -> None:
    content = [
        {"video": "a", "question": "What is it?", "answer": "A Dog", "question_id": 7},
        {"video": "b", "question": "who", "answer": "she"},
        {"video": "a", "question": "where", "answer": "home"},
    ]
    path = annotations(tmp_path, content)
    videos, questions = read_questions(path)
    assert videos == ["a", "b"]
    # a question is normalised, an answer is not
    assert questions == [Question(0, "what is it", "A Dog"), Question(1, "who", "she"), Question(0, "where", "home")]
    assert read_questions(path, limit=1) == (["a"], [questions[0], questions[2]])
    with pytest.raises(EvaluationError, match=r"entry 0 has \['a', 'b'\] for its answer"):
        read_questions(annotations(tmp_path, [{"video": "a", "question": "x", "answer": ["a", "b"]}]))


def test_answers(tmp_path: Path) -> None:
    path = annotations(tmp_path, ["yes", "No", "yes", "two"])
    assert read_answers(path, 3) == ["yes", "No", "two"]
    with pytest.raises(EvaluationError, match=r"has 3 answers, and the 128 likeliest are ranked; .*--candidates 3"):
        read_answers(path, 128)
    for content in ({"yes": 1}, [], ["yes", 2], ["yes", " "]):
        with pytest.raises(EvaluationError, match="is no list of answers"):
            read_answers(annotations(tmp_path, content), 1)


def test_videos_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    check_present(["a"], tmp_path, tmp_path / "f.json", "questions")
    with pytest.raises(EvaluationError, match=r"has questions for videos that are not in .*: b, c, d and 1 more"):
        check_present(["a", "b", "c", "d", "e"], tmp_path, tmp_path / "f.json", "questions")
    with pytest.raises(EvaluationError, match="there is no folder"):
        check_present([], tmp_path / "nowhere", tmp_path / "f.json", "questions")


def test_names_of_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_dataset(parser, list(DATASETS), "which")
    assert parser.parse_args(["--dataset", "msrvtt"]).dataset == "MSRVTT"
    assert parser.parse_args(["--dataset", "ssv2-LABEL"]).dataset == "SSV2-label"
    with pytest.raises(SystemExit):
        parser.parse_args(["--dataset", "msr"])
    assert "'msr' is none of MSRVTT, MSVD" in capsys.readouterr().err


def cubic(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3 if x < 2 else 0.0


def resized(row: np.ndarray, size: int) -> np.ndarray:
    """Cubic interpolation of one row by its four neighbours, no antialiasing; a = -0.75, edges repeated."""
    out = []
    for i in range(size):
        at = (i + 0.5) * len(row) / size - 0.5
        first = int(np.floor(at))
        taken = [(row[min(max(j, 0), len(row) - 1)], cubic(at - j)) for j in range(first - 1, first + 3)]
        out.append(sum(value * weight for value, weight in taken))
    return np.stack(out)


def test_pixels_are_resized_straight_without_antialiasing_to_whole_levels() -> None:
    frames = np.random.RandomState(0).randint(0, 256, (2, 30, 50, 3)).astype(np.uint8)
    sharp = resized(resized(frames[0].astype(np.float64), 16).transpose(1, 0, 2), 16).transpose(1, 0, 2)
    levels = np.clip(sharp, 0, 255)
    wanted = (np.round(levels) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    found = prepared(torch.from_numpy(frames), 16)
    assert found.shape == (2, 3, 16, 16) and (sharp < 0).any() and (sharp > 255).any()
    # a level that lies at a half may be rounded the other way in single precision
    close = np.abs(found[0].permute(1, 2, 0).numpy() - wanted) < 1e-4
    assert close[np.abs(levels % 1 - 0.5) > 1e-3].all()
    smooth = np.asarray(Image.fromarray(frames[0]).resize((16, 16), Image.Resampling.BICUBIC))
    assert np.abs(smooth - np.round(levels)).max() > 20  # with antialiasing it is another picture


def test_a_clip_of_a_file(tmp_path: Path) -> None:
    frames = filmed(Scene("red", "bar", "left"), np.random.RandomState(0), photographs())
    write_video(tmp_path / "a.mkv", frames)
    clip = Clips(tmp_path, ("a.mkv",), 4, 64)(0)
    assert clip.shape == (3, 4, 64, 64)
    wanted = prepared(torch.from_numpy(frames[middles(LENGTH, 4)]), 64)
    torch.testing.assert_close(clip, wanted.transpose(0, 1))
