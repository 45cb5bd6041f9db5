"""The data sets that UMT is evaluated on, and their annotation files, as VindLU released them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.evaluate.annotations import read_json
from bench.evaluate.journal import EvaluationError
from bench.evaluate.sweep import spread
from bench.evaluate.umt.tokens import normalised


@dataclass(frozen=True)
class DataSet:
    """How a data set of retrieval is read.

    Args:
        tokens: of a text at most, [CLS] counted.
        paragraph: the captions of a video are one text.
        seconds: only so many first seconds of a video are seen.
    """

    tokens: int
    paragraph: bool = False
    seconds: int | None = None


# by the paper's names
DATASETS: Mapping[str, DataSet] = {
    "MSRVTT": DataSet(32),
    "MSVD": DataSet(64),
    "ActivityNet": DataSet(150, paragraph=True),
    "DiDeMo": DataSet(64, paragraph=True, seconds=30),
    "LSMDC": DataSet(96),
    "SSV2-label": DataSet(25),
    "SSV2-template": DataSet(25),
}


@dataclass(frozen=True)
class Captions:
    """Which texts describe which videos.

    Args:
        videos, texts: each once, in the file's order; texts are normalised.
        pairs: (text, video), by their numbers. Every text and every video is in one or more.
    """

    videos: list[str]
    texts: list[str]
    pairs: list[tuple[int, int]]

    def of_videos(self, chosen: Sequence[int]) -> Captions:
        """These videos alone, with the texts that describe one of them."""
        new = {video: i for i, video in enumerate(chosen)}
        left = [(text, new[video]) for text, video in self.pairs if video in new]
        texts = {text: i for i, text in enumerate(sorted({text for text, _ in left}))}
        return Captions(
            [self.videos[video] for video in chosen],
            [self.texts[text] for text in texts],
            [(texts[text], video) for text, video in left],
        )


def read_captions(path: Path, dataset: DataSet, limit: int | None = None) -> Captions:
    """The annotation file of a retrieval test set.

    Args:
        path: a JSON list of {"video": a file or a list of files, "caption": a text or a list of texts}. A list of texts
            is one paragraph or as many texts, as the data set wants it; a list of videos all fit each text.
        limit: so many videos at most, evenly spaced, with their texts.

    Raises:
        EvaluationError: it is something else; names the entry.
    """
    shape = '[{"video": "a.mp4", "caption": "a text"}, ...]; either may be a list'
    videos: dict[str, int] = {}
    texts: list[str] = []
    pairs: list[tuple[int, int]] = []
    for where, entry in _entries(path, shape):
        files, captions = _strings(entry, "video", where, shape), _strings(entry, "caption", where, shape)
        captions = [" ".join(captions)] if dataset.paragraph else captions
        for caption in captions:
            # a list, as some files repeat a video in it, would count a pair twice
            pairs += [(len(texts), videos.setdefault(file, len(videos))) for file in dict.fromkeys(files)]
            texts.append(normalised(caption))
    captions_of = Captions(list(videos), texts, pairs)
    return captions_of if limit is None else captions_of.of_videos(spread(len(videos), limit))


@dataclass(frozen=True)
class Question:
    """A question on a video, normalised, and its answer as the file has it."""

    video: int
    text: str
    answer: str


def read_questions(path: Path, limit: int | None = None) -> tuple[list[str], list[Question]]:
    """The annotation file of a question-answering test set: its videos, each once, and its questions.

    Args:
        path: a JSON list of {"video": a file, "question": a text, "answer": a text}.
        limit: so many videos at most, evenly spaced, with their questions.

    Raises:
        EvaluationError: it is something else; names the entry.
    """
    shape = '[{"video": "a.mp4", "question": "what is it", "answer": "a dog"}, ...]'
    videos: dict[str, int] = {}
    questions = []
    for where, entry in _entries(path, shape):
        (video,), (text,), (answer,) = (
            _strings(entry, key, where, shape, one=True) for key in ("video", "question", "answer")
        )
        questions.append(Question(videos.setdefault(video, len(videos)), normalised(text), answer))
    new = {video: i for i, video in enumerate(spread(len(videos), limit))}
    names = list(videos)
    kept = [Question(new[q.video], q.text, q.answer) for q in questions if q.video in new]
    return [names[video] for video in new], kept


def read_answers(path: Path, most: int) -> list[str]:
    """The candidate answers: a JSON list of texts, each once.

    Args:
        most: so many candidates are ranked in the second stage; there must be that many.

    Raises:
        EvaluationError: it is something else, or too short.
    """
    answers = read_json(path, '["yes", "no", ...]')
    if not (isinstance(answers, list) and answers and all(isinstance(a, str) and a.strip() for a in answers)):
        raise EvaluationError(f'{path} is no list of answers; write ["yes", "no", ...]')
    answers = list(dict.fromkeys(answers))
    if len(answers) < most:
        raise EvaluationError(
            f"{path} has {len(answers)} answers, and the {most} likeliest are ranked; give the whole list, or pass "
            f"--candidates {len(answers)}, which is not as published"
        )
    return answers


def _entries(path: Path, shape: str) -> Iterator[tuple[str, dict[str, Any]]]:
    content = read_json(path, shape)
    if not (isinstance(content, list) and content):
        raise EvaluationError(f"{path} is no list of annotations; write {shape}")
    for i, entry in enumerate(content):
        if not isinstance(entry, dict):
            raise EvaluationError(f"{path}, entry {i}: {entry!r} is no annotation; write {shape}")
        yield f"{path}, entry {i}", entry


def _strings(entry: dict[str, Any], key: str, where: str, shape: str, one: bool = False) -> list[str]:
    value: Any = entry.get(key)
    values: Any = [value] if isinstance(value, str) else value
    good = isinstance(values, list) and values and all(isinstance(v, str) and v.strip() for v in values)
    if not good or (one and len(values) > 1):
        raise EvaluationError(f"{where} has {value!r} for its {key}; write {shape}")
    return list(values)
