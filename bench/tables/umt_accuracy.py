"""Accuracy of UMT whole, in retrieval or question answering, its vision encoder run by each method."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.evaluate.umt.command import loaded
from bench.evaluate.umt.datasets import DATASETS
from bench.evaluate.umt.retrieval import evaluate_umt_retrieval
from bench.evaluate.umt.vqa import evaluate_vqa
from bench.models.umt_tasks import UMT_SIZES, UmtAnswering, UmtRetrieval, UmtSize
from bench.models.umt_text import TextSize
from bench.tables.accuracy import Scores, retrieved
from bench.tables.methods import Method
from bench.tables.options import Setting
from bench.tables.subjects import UMT, Subject, vision_size

_STAND_IN = TextSize(48, 3, 3, fusion=2)


def measure(
    subject: Subject, methods: Sequence[Method], setting: Setting, args: argparse.Namespace, resume: Path | None
) -> Scores:
    """Columns of accuracy for each method, by its label.

    Args:
        subject: UMT-B or UMT-L, or its stand-in with random weights.
        methods: what runs the vision encoder; what tokens it leaves, the text side reads as they are.
        args: with `--videos`, `--annotations`, `--dataset` (and `--answers`); `--text-config` and `--checkpoint` of it.
        resume: where an interrupted evaluation keeps what is done.
    """
    name = subject.name
    _, frames, side, _ = subject.shape
    size = UMT_SIZES[UMT[name].removeprefix("umt_")]
    if subject.stand_in:
        size = UmtSize(vision_size(name, quick=True), _STAND_IN, 16, frames, side)
    kind: Any = UmtAnswering if subject.data == "answers" else UmtRetrieval
    model, tokenizer = loaded(kind, size, dict(args.checkpoint).get(name), dict(args.text_config)[name])
    model = model.to(setting.device, setting.dtype)
    encoder = model.vision_encoder.encoder
    encoders = {m.label: _compact(m).apply(encoder, setting.backend) for m in methods}
    identity = {m.label: _identity(m, setting) for m in methods}
    given: dict[str, Any] = {
        "batch_size": setting.batch_size or 4,
        "workers": args.workers,
        "device": setting.device,
        "dtype": setting.dtype,
        "limit": args.limit,
    }
    files = args.videos, args.annotations
    columns: Scores
    if isinstance(model, UmtAnswering):
        given |= {"candidates": args.candidates, "resume": resume, "identity": identity}
        answered = evaluate_vqa(model, encoders, tokenizer, *files, args.answers, **given)
        columns = {label: {**asdict(score), "images": score.videos} for label, score in answered.items()}
    else:
        given |= {"cache": resume, "identity": identity}
        found = evaluate_umt_retrieval(model, encoders, tokenizer, DATASETS[args.dataset], *files, **given)
        columns = {label: retrieved(score) for label, score in found.items()}
    return {label: {**row, "data": str(args.videos)} for label, row in columns.items()}


def _compact(method: Method) -> Method:
    """The method with the tokens that it leaves given as they are."""
    if method.schedule is None:
        return method
    return replace(method, options={**method.options, "token_outputs": "compact"})


def _identity(method: Method, setting: Setting) -> dict[str, Any]:
    schedule = method.schedule and json.loads(method.schedule.to_json())
    return {"fused": method.fused, "backend": setting.backend, "schedule": schedule, "options": dict(method.options)}
