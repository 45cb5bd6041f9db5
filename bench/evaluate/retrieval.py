"""Text-video retrieval with dual encoders: recalls both ways and their means."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.evaluate.annotations import check_present, read_json
from bench.evaluate.frames import uniform_frames
from bench.evaluate.journal import EvaluationError, Journal, as_text, fingerprint, from_text, listing
from bench.evaluate.ranks import Ranks
from bench.evaluate.recall import Found, recalls, related
from bench.evaluate.sweep import Skipped, spread, sweep

_TEXTS = 64  # captions encoded at once


class DualEncoder(Protocol):
    """Videos and texts in one space, where the cosine says how well they fit."""

    def encode_videos(self, frames: Tensor) -> Tensor:
        """Prepared frames [B, T, 3, H, W] -> features [B, D]."""

    def encode_texts(self, texts: list[str]) -> Tensor:
        """B texts -> features [B, D]."""


@dataclass(frozen=True)
class RetrievalScores(Found):
    """What a dual encoder retrieves.

    Args:
        videos, captions: how many there were.
        skipped: the videos that could not be read, with their captions left out.
    """

    videos: int
    captions: int
    skipped: tuple[Skipped, ...]


def read_captions(path: Path) -> dict[str, list[str]]:
    """Video files and their captions, in the file's order.

    Args:
        path: JSON, {"video.mp4": ["a caption", ...]} or [{"video": "video.mp4", "caption": "a caption"}, ...]; one
            caption may stand for a list of one in both, and a video may stand in several entries of the second.

    Raises:
        EvaluationError: there is no such file, or it is something else.
    """
    shapes = 'write {"video.mp4": ["a caption", ...]} or [{"video": "video.mp4", "caption": "a caption"}, ...]'
    content = read_json(path, shapes.removeprefix("write "))
    captions: dict[str, list[str]] = {}
    if isinstance(content, dict):
        pairs = list(content.items())
    elif isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        pairs = [(entry.get("video"), entry.get("caption")) for entry in content]
    else:
        raise EvaluationError(f"{path} holds no captions; {shapes}")
    for video, texts in pairs:
        texts = [texts] if isinstance(texts, str) else texts
        good = isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
        if not (isinstance(video, str) and video and good):
            raise EvaluationError(f"{path}: {video!r} has {texts!r} for captions; {shapes}")
        captions.setdefault(video, []).extend(texts)
    if not captions:
        raise EvaluationError(f"{path} holds no captions; {shapes}")
    return captions


@torch.no_grad()
def evaluate_retrieval(
    encoders: Mapping[str, DualEncoder],
    videos: Path,
    captions: Path,
    transform: Callable[[Tensor], Tensor],
    *,
    frames: int = 12,
    batch_size: int = 4,
    workers: int = 2,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    resume: Path | None = None,
    limit: int | None = None,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, RetrievalScores]:
    """Runs all encoders on the same frames of the videos that have captions, and ranks by cosine similarity.

    Args:
        encoders: by name; on `device` in `dtype`, in eval mode.
        videos: the folder of the video files.
        captions: which of its videos count, and their captions: see `read_captions`.
        transform: one video's frames, uint8 [T, H, W, 3] -> [T, 3, h, w] as the encoders want them.
        frames: of each video, evenly spaced: see `uniform_frames`.
        batch_size, workers: videos at once, and processes that read them.
        device, dtype: of what the encoders are given.
        resume: file of what is done, to go on from: see `Journal`.
        limit: so many videos at most, evenly spaced over the captions' order; fewer are easier to tell apart.
        identity: what else belongs to the evaluation's identity, as schedules; weights are known from modules.

    Returns:
        The scores of every encoder by its name. Videos that cannot be read, or have fewer frames, are in
        `skipped`; a command that prints these scores names them and exits with an error code.

    Raises:
        EvaluationError: no such folder, captions of videos that are not there or that cannot be read, features that
            do not fit, a resume file of another evaluation, no video that can be read.
    """
    texts = read_captions(captions)
    check_present(list(texts), videos, captions, "captions")
    everything = list(texts)
    files = [everything[i] for i in spread(len(everything), limit)]
    ranks = Ranks.join()
    device = ranks.device(device)
    evaluation = {
        "evaluation": "retrieval",
        "videos": len(files),
        "listing": listing((name, videos / name) for name in files),
        "captions": hashlib.sha256(json.dumps([texts[name] for name in files]).encode()).hexdigest()[:16],
        "encoders": {name: fingerprint(encoder) for name, encoder in encoders.items()},
        "frames": frames,
        "transform": repr(transform),
        "dtype": str(dtype),
        "device": device.type,
        "batch size": batch_size,
        **(identity or {}),
    }
    lines = [(video, text) for video, name in enumerate(files) for text in texts[name]]
    # before the videos: what is wrong with a text shows in seconds
    of_texts = {name: _of_texts(encoder, [text for _, text in lines]) for name, encoder in encoders.items()}

    def measure(indices: list[int], clips: Tensor) -> dict[str, Any]:
        clips = clips.to(device, dtype)
        packed = {
            name: _packed(name, encoder.encode_videos(clips), len(indices), of_texts[name].shape[1])
            for name, encoder in encoders.items()
        }
        return {"indices": indices, "features": packed}

    measured, skipped = sweep(
        _Read(videos, tuple(files), frames, transform),
        files,
        measure,
        batch_size=batch_size,
        workers=workers,
        journal=Journal(resume, evaluation, ranks),
        ranks=ranks,
        title=f"{len(files)} videos",
        found_in=("videos", videos),
    )
    column = {video: i for i, video in enumerate(i for batch in measured for i in batch["indices"])}
    rows = [row for row, (video, _) in enumerate(lines) if video in column]
    own = related([(i, column[lines[row][0]]) for i, row in enumerate(rows)], len(rows), len(column))
    scores = {}
    for name in encoders:
        of_videos = torch.cat([from_text(batch["features"][name]) for batch in measured]).view(len(column), -1)
        found = recalls(of_texts[name][rows] @ of_videos.T, own)
        scores[name] = RetrievalScores(**vars(found), videos=len(column), captions=len(rows), skipped=skipped)
    return scores


@dataclass(frozen=True)
class _Read:
    folder: Path
    files: tuple[str, ...]
    frames: int
    transform: Callable[[Tensor], Tensor]

    def __call__(self, index: int) -> Tensor:
        return self.transform(uniform_frames(self.folder / self.files[index], self.frames))


def _of_texts(encoder: DualEncoder, texts: list[str]) -> Tensor:
    """Normalised features [len(texts), D], float32 on the CPU."""
    chunks = [texts[i : i + _TEXTS] for i in range(0, len(texts), _TEXTS)]
    return F.normalize(torch.cat([encoder.encode_texts(chunk).float().cpu() for chunk in chunks]), dim=1)


def _packed(name: str, features: Tensor, count: int, dim: int) -> str:
    """Normalised features [count, dim] as text."""
    if features.shape != (count, dim):
        raise EvaluationError(
            f"{name} gave features {list(features.shape)} for {count} videos, of which texts have {dim}; "
            "the video and the text encoder must end in the same space"
        )
    return as_text(F.normalize(features.float(), dim=1))
