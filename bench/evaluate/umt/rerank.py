"""Re-ranking: the best candidates of each text and of each video, held against each other by the fusion layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench.evaluate.umt.tokens import Tokens
from bench.models.umt_tasks import UmtRetrieval

SHORTLIST = 128  # candidates of each text and of each video
OUTSIDE = -100.0  # the score of a pair that is on no shortlist
_ENCODED, _FUSED = 64, 32  # texts at once


@dataclass(frozen=True)
class Texts:
    """Texts behind the layers that know no video.

    Args:
        states: of each text [L, C], L its own length, on the CPU.
        projected: [T, D] in the shared space, float32 on the CPU.
    """

    states: list[Tensor]
    projected: Tensor

    @classmethod
    def of(cls, model: UmtRetrieval, tokens: Tokens, device: torch.device) -> Texts:
        """Args: tokens: of all texts; what is filled up is dropped."""
        states: list[Tensor] = []
        projected = []
        lengths = tokens.mask.sum(1)
        for start in range(0, len(lengths), _ENCODED):
            rows = range(start, min(start + _ENCODED, len(lengths)))
            part = tokens.rows(rows).to(device)
            x = model.text_encoder.text(part.ids, part.mask)
            projected.append(model.projected(x).cpu())
            states += [row[: lengths[i]].cpu() for row, i in zip(x, rows, strict=True)]
        return cls(states, torch.cat(projected))


def shortlists(similarity: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Which pairs are re-ranked, bool [T, V]: among each text's `most` best videos, and each video's `most` best texts.

    Args:
        similarity: [T, V].
    """
    lists = []
    for dim in (1, 0):
        best = similarity.argsort(stable=True, dim=dim, descending=True).narrow(
            dim, 0, min(most, similarity.shape[dim])
        )
        lists.append(torch.zeros_like(similarity, dtype=torch.bool).scatter_(dim, best, True))
    return lists[0], lists[1]


def match(model: UmtRetrieval, texts: Texts, rows: Sequence[int], video: Tensor) -> Tensor:
    """How well texts match a video: raw logits [n], float32 on the CPU.

    Args:
        rows: which texts.
        video: its tokens [K, W] as they were left, on the model's device.
    """
    found = []
    for start in range(0, len(rows), _FUSED):
        states = [texts.states[row] for row in rows[start : start + _FUSED]]
        lengths = torch.tensor([len(state) for state in states])
        padded = pad_sequence(states, batch_first=True)
        mask = torch.arange(padded.shape[1]) < lengths.unsqueeze(1)
        found.append(model.matching(padded.to(video), mask.to(video.device), video.unsqueeze(0)).cpu())
    return torch.cat(found) if found else torch.empty(0)
