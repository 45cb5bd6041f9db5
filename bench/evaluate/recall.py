"""How often the right one is among the first: recalls both ways, and their means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.evaluate.journal import EvaluationError

KS = (1, 5, 10)


@dataclass(frozen=True)
class Recalls:
    """R@1, R@5 and R@10 in percent: how often a right one is among the first 1, 5, 10."""

    r1: float
    r5: float
    r10: float

    @property
    def all(self) -> tuple[float, float, float]:
        return self.r1, self.r5, self.r10


@dataclass(frozen=True)
class Found:
    """Recalls both ways.

    Args:
        text_to_video: of each text, the best of its videos among all videos.
        video_to_text: of each video, the best of its texts among all texts.
        arithmetic: their mean, which reproduces the base rows that the paper calls harmonic means.
        harmonic: their harmonic mean.
    """

    text_to_video: Recalls
    video_to_text: Recalls
    arithmetic: Recalls
    harmonic: Recalls


def related(pairs: Iterable[tuple[int, int]], texts: int, videos: int) -> Tensor:
    """bool [texts, videos], True where a text describes a video."""
    own = torch.zeros(texts, videos, dtype=torch.bool)
    own[tuple(torch.tensor(list(pairs)).T)] = True
    return own


def recalls(scores: Tensor, own: Tensor, of_videos: Tensor | None = None) -> Found:
    """R@1/5/10 both ways.

    Ties count against: a wrong one that scores as the right one stands before it. So a model that gives all the same
    finds nothing, and of two videos with the same caption neither is found first by it.

    Args:
        scores: [T, V], of T texts and V videos, to rank the videos of a text.
        own: bool [T, V], which belong together: one or more in each row and column.
        of_videos: [T, V], to rank the texts of a video; None: the same.

    Raises:
        EvaluationError: a score is not finite, or a video or text belongs to nothing.
    """
    for scored in (scores, scores if of_videos is None else of_videos):
        if not scored.isfinite().all():
            raise EvaluationError("the similarities are not finite; evaluate in float32 or bfloat16")
    for what, other, alone in (("video", "caption", ~own.any(0)), ("caption", "video", ~own.any(1))):
        if alone.any():
            raise EvaluationError(f"{what} {int(alone.nonzero()[0])} has no {other}")
    to_videos, to_texts = _one_way(scores, own), _one_way((scores if of_videos is None else of_videos).T, own.T)
    return Found(to_videos, to_texts, *means(to_videos, to_texts))


def means(one: Recalls, other: Recalls) -> tuple[Recalls, Recalls]:
    """The arithmetic and the harmonic mean, at each of 1, 5, 10."""
    pairs = list(zip(one.all, other.all, strict=True))
    harmonic = (2 * a * b / (a + b) if a + b else 0.0 for a, b in pairs)
    return Recalls(*((a + b) / 2 for a, b in pairs)), Recalls(*harmonic)


def _one_way(scores: Tensor, own: Tensor) -> Recalls:
    """Of each row, the best of its own against the others."""
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    places = (scores.masked_fill(own, -torch.inf) >= best).sum(1)
    return Recalls(*(100 * float((places < k).double().mean()) for k in KS))
