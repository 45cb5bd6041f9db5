"""Zero-TPrune's score: PageRank on the attention graph, after the tokens most like a better one were taken out."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Start = Literal["class", "uniform"]
LEAST, MOST = 0.01, 0.7  # variance of a head's scores


def zero_tprune(
    attention: Tensor,
    keys: Tensor,
    protected: Tensor | None,
    similar: int,
    rounds: int,
    start: Start = "uniform",
    head_filter: bool = False,
) -> Tensor:
    """Scores [B, N]: importance where `similar` is 0; else that many tokens score below 0, the most similar lowest.

    I' stage: importance by one round of votes. S stage: of the half of lower importance, those whose key is most like
    one of the upper half go. I stage: importance among the tokens left, whose votes each sum to 1 again.

    Args:
        attention: [B, H, N, N].
        keys: [B, H, N, d], of which heads are averaged.
        protected: [N] or [B, N] bool: these take no part in the S stage; None where there is none.
        similar: how many tokens go in the S stage.
        rounds: of votes in the I stage.
        start, head_filter: see `importance`.
    """
    attention = attention.detach().float()
    if not similar or protected is None:
        return importance(attention, rounds, start, head_filter)
    first = importance(attention, 1, start, head_filter)
    protected = protected.expand_as(first)
    gone, cosine = _similar(first, keys.detach().float().mean(1), protected, similar)
    votes = attention.masked_fill(gone[:, None, None], 0)
    votes = votes / votes.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(gone, -2 - cosine, importance(votes, rounds, start, head_filter, gone))


def importance(
    votes: Tensor, rounds: int, start: Start, head_filter: bool = False, gone: Tensor | None = None
) -> Tensor:
    """Weighted PageRank [B, N] of each head, heads joined by the root of the mean of squares.

    Args:
        votes: what each token (row) gives to each, [B, H, N, N].
        rounds: how often a token's votes are weighed by its own score.
        start: all tokens alike, or the class token, the first one, the root of N times above them.
        head_filter: only heads take part whose scores, scaled to mean 1, have a variance from 0.01 to 0.7; all do
            where none would.
        gone: [B, N] bool, tokens without a vote.
    """
    count = votes.shape[-1]
    at = torch.arange(count, device=votes.device)
    weight = torch.where((at == 0) & (start == "class"), count**0.5, 1.0).expand(votes.shape[0], 1, count)
    if gone is not None:
        weight = weight.masked_fill(gone.unsqueeze(1), 0)
    score = (weight / weight.sum(-1, keepdim=True)).unsqueeze(2).expand(-1, votes.shape[1], -1, -1)
    for _ in range(rounds):
        score = score @ votes
    score = score.squeeze(2)
    if not head_filter:
        return score.square().mean(1).sqrt()
    variance = (score * count).var(-1, correction=0, keepdim=True)
    passes = ((variance >= LEAST) & (variance <= MOST)).float()
    passes = torch.where(passes.sum(1, keepdim=True) > 0, passes, 1.0)
    return ((score.square() * passes).sum(1) / passes.sum(1)).sqrt()


def _similar(score: Tensor, keys: Tensor, protected: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which tokens go in the S stage, [B, N] bool, and each one's cosine to the most similar of the better half.

    Args:
        score: [B, N].
        keys: [B, N, d].
    """
    key = score.masked_fill(protected, -torch.inf)
    place = _places(key)
    free = (~protected).sum(1, keepdim=True)
    upper, lower = place < (free + 1) // 2, (place >= (free + 1) // 2) & (place < free)
    unit = F.normalize(keys, dim=-1)
    near = (unit @ unit.transpose(1, 2)).masked_fill(~upper.unsqueeze(1), -torch.inf).amax(2)
    gone = _places(near.masked_fill(~lower, -torch.inf)) < count
    return gone & lower, near


def _places(key: Tensor) -> Tensor:
    """Each token's place when the highest come first; ties as they are."""
    order = key.sort(dim=1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter(1, order, torch.arange(key.shape[1], device=key.device).expand_as(order))
