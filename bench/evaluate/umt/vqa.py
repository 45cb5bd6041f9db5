"""Video question answering with UMT: the likeliest of a list of answers, right where it is the annotated one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.evaluate.annotations import check_present
from bench.evaluate.journal import Journal, fingerprint, listing
from bench.evaluate.ranks import Ranks
from bench.evaluate.sweep import Skipped, sweep
from bench.evaluate.umt.answers import CANDIDATES, QUESTION_TOKENS, answer, answer_tokens
from bench.evaluate.umt.datasets import read_answers, read_questions
from bench.evaluate.umt.pixels import Clips
from bench.evaluate.umt.retrieval import VideoEncoder
from bench.evaluate.umt.tokens import Tokenizer, Tokens
from bench.models.umt_tasks import UmtAnswering
from passes.sites.restore import TokenOutput


@dataclass(frozen=True)
class AnswerScores:
    """How often the answer is the annotated one, letter by letter.

    Args:
        accuracy: in percent of all questions.
        questions: how many there were, also those on videos that could not be read, which count as wrong.
        unlisted: questions whose annotated answer is not among the candidates, so that no model can be right.
        unread: questions on videos that could not be read.
        videos: how many could be read.
        skipped: the others.
    """

    accuracy: float
    questions: int
    unlisted: int
    unread: int
    videos: int
    skipped: tuple[Skipped, ...]


@torch.no_grad()
def evaluate_vqa(
    model: UmtAnswering,
    encoders: Mapping[str, VideoEncoder],
    tokenizer: Tokenizer,
    videos: Path,
    annotations: Path,
    answers: Path,
    *,
    candidates: int = CANDIDATES,
    batch_size: int = 4,
    workers: int = 2,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    resume: Path | None = None,
    limit: int | None = None,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, AnswerScores]:
    """Runs all vision encoders on the same frames, each video once; the question encoder and decoder are the model's.

    Args:
        model, encoders, tokenizer, videos: see `evaluate_umt_retrieval`.
        annotations: see `read_questions`.
        answers: see `read_answers`.
        candidates: so many answers are ranked in the second stage.
        batch_size, workers: videos at once, and processes that read them.
        device, dtype: of what the encoders are given.
        resume: file of what is done, to go on from: see `Journal`.
        limit: so many videos at most, evenly spaced, with their questions.
        identity: what else the answers depend on, as schedules.

    Raises:
        EvaluationError: no such folder, annotations of videos that are not there or that cannot be read, too short a
            list of answers, a resume file of another evaluation, no video that can be read.
    """
    files, questions = read_questions(annotations, limit)
    check_present(files, videos, annotations, "questions")
    listed = read_answers(answers, candidates)
    ranks = Ranks.join()
    device = ranks.device(device)
    of_answers = answer_tokens(tokenizer, listed).to(device)
    of_videos: list[list[int]] = [[] for _ in files]
    for i, question in enumerate(questions):
        of_videos[question.video].append(i)
    tokens = Tokens.of(tokenizer, [question.text for question in questions], QUESTION_TOKENS)
    asked = [tokens.ids.tolist(), [(q.video, q.answer) for q in questions], listed, candidates]
    evaluation = {
        "evaluation": "umt question answering",
        "videos": listing((name, videos / name) for name in files),
        "questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
        "weights": fingerprint(model),
        "encoders": list(encoders),
        "dtype": str(dtype),
        "device": device.type,
        "batch size": batch_size,
        **(identity or {}),
    }

    def measure(indices: list[int], clips: Tensor) -> dict[str, Any]:
        clips = clips.to(device, dtype)
        given: dict[str, list[list[int]]] = {}
        for name, encoder in encoders.items():
            output = encoder(clips)
            left = output.tokens if isinstance(output, TokenOutput) else output
            given[name] = [
                answer(model, tokens.rows(of_videos[index]).to(device), video, of_answers, candidates)
                for index, video in zip(indices, left, strict=True)
            ]
        return {"indices": indices, "answers": given}

    measured, skipped = sweep(
        Clips(videos, tuple(files), model.size.frames, model.size.side),
        files,
        measure,
        batch_size=batch_size,
        workers=workers,
        journal=Journal(resume, evaluation, ranks),
        ranks=ranks,
        title=f"{len(files)} videos, {len(questions)} questions",
        found_in=("videos", videos),
    )
    known = set(listed)
    read = [index for batch in measured for index in batch["indices"]]
    counts: dict[str, Any] = {
        "questions": len(questions),
        "unlisted": sum(question.answer not in known for question in questions),
        "unread": len(questions) - sum(len(of_videos[index]) for index in read),
        "videos": len(read),
        "skipped": skipped,
    }
    scores = {}
    for name in encoders:
        given = [answers for batch in measured for answers in batch["answers"][name]]
        right = sum(
            listed[place] == questions[i].answer
            for index, places in zip(read, given, strict=True)
            for i, place in zip(of_videos[index], places, strict=True)
        )
        scores[name] = AnswerScores(100 * right / len(questions), **counts)
    return scores
