"""Token merging as ordinary PyTorch: who merges into whom, and what comes out.

Bipartite matching as in ToMe (Bolya et al., 2023): tokens at even positions are sources, at odd ones destinations; each
source has an edge to its most similar destination, and the r strongest edges merge.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Order = Literal["sequence", "even-odd", "strength"]


class Matched(NamedTuple):
    """r sources and the destinations they merge into, [B, r]; positions of the tokens left, [B, N - r], in their new
    order; the place of each source's destination in that order, [B, r]; and for each of the N tokens the place that now
    stands for it, [B, N]."""

    sources: Tensor
    destinations: Tensor
    left: Tensor
    into: Tensor
    place: Tensor


def most(count: int, prefix: int, suffix: int, extra: int) -> int:
    """How many of `count` tokens may merge away: the unprotected sources, if a destination is left."""
    protected = [i < prefix or i >= count - suffix for i in range(count)]
    sources, destinations = (sum(not p for p in protected[start::2]) for start in (0, 1))
    half = (sources + destinations) // 2  # ToMe's and vid-TLDR's limit, where sources outnumber destinations
    # where the protected tokens between are after earlier sites is not known
    return max(0, min(sources, half) - extra) if destinations > extra else 0


def match(features: Tensor, protected: Tensor, r: int, prefix: int, suffix: int, order: Order) -> Matched:
    """Finds the r strongest edges between tokens at even and at odd positions; ties go to the earlier token.

    Args:
        features: [B, N, D], compared by their cosine.
        protected: [N] or [B, N] bool, true where a token neither merges nor is merged into.
        r: at most `most(...)`.
        prefix, suffix: protected tokens at either end, which stay there.
        order: of the tokens left: as they were ("sequence"); ToMe's and vid-TLDR's, which decides their next
            pairing: even positions, then odd ones ("even-odd"), the even ones by edge strength where ToMe has no
            class token ("strength").
    """
    features = F.normalize(features.detach().float(), dim=-1).to(features.dtype)
    batch, count = features.shape[:2]
    protected = protected.expand(batch, count)
    similar = (features[:, ::2] @ features[:, 1::2].transpose(1, 2)).float()
    similar = similar.masked_fill(protected[:, ::2, None] | protected[:, None, 1::2], -torch.inf)
    strength, to = similar.max(-1)  # the first of equals
    ranked = strength.sort(dim=1, descending=True, stable=True).indices
    sources = 2 * ranked[:, :r]
    destinations = 2 * to.gather(1, ranked[:, :r]) + 1
    evens = 2 * ranked[:, r:]
    if order == "even-odd":  # in the sequence's order all are sorted below
        evens = evens.sort(dim=1).values
    odds = torch.arange(1, count, 2, device=features.device).expand(batch, -1)
    left = torch.cat([evens, odds], 1)
    # no tokens at the ends merge, so these stand where they always stand
    left = left.sort(dim=1).values if order == "sequence" else _ends_first(left, count, prefix, suffix)
    place = torch.empty_like(protected, dtype=torch.int64)
    place = place.scatter(1, left, torch.arange(count - r, device=left.device).expand(batch, -1))
    into = place.gather(1, destinations)
    return Matched(sources, destinations, left, into, place.scatter(1, sources, into))


def _ends_first(left: Tensor, count: int, prefix: int, suffix: int) -> Tensor:
    """Positions [B, K] with the protected ends moved back to where they were, the rest in its order."""
    if prefix == 0 and suffix == 0:
        return left
    at = torch.arange(left.shape[1], device=left.device)
    key = torch.where(left < prefix, left - count, at)
    key = torch.where(left >= count - suffix, left + count, key)
    return left.gather(1, key.argsort(dim=1))


def merge(x: Tensor, sizes: Tensor, matched: Matched, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tokens left, each the weighted mean of what merged into it, and their sizes.

    x_b <- (n_b x_b + sum_a s_a n_a x_a) / (n_b + sum_a s_a n_a), n_b <- n_b + sum_a s_a n_a over the sources a of b. A
    token that nothing merges into is unchanged, to the bit.

    Args:
        x: [B, N, C].
        sizes: n, [B, N] float32.
        weights: s, [B, N] float32 (vid-TLDR's saliency); None for 1: then sizes sum to the number of tokens.

    Returns:
        [B, N - r, C] and [B, N - r].
    """
    sources, left, into = matched.sources, matched.left, matched.into
    share = sizes.gather(1, sources)
    if weights is not None:
        share = share * weights.gather(1, sources)
    sizes = sizes.gather(1, left).scatter_add(1, into, share)

    def rows(index: Tensor) -> Tensor:
        return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])

    wide = torch.promote_types(x.dtype, torch.float32)
    short = x.gather(1, rows(left)).to(wide)
    apart = x.gather(1, rows(sources)).to(wide) - short.gather(1, rows(into))
    share = (share / sizes.gather(1, into)).to(wide).unsqueeze(-1)
    return short.scatter_add(1, rows(into), apart * share).to(x.dtype), sizes


def saliency(score: Tensor, protected: Tensor) -> Tensor:
    """vid-TLDR's weights: how far a score lies above the mean, 0 below it, 1 at the highest; [B, N] float32.

    Args:
        score: e, [B, N].
        protected: [N] or [B, N]; these tokens count for nothing.
    """
    score, protected = score.detach().float(), protected.expand_as(score)
    tiny = torch.finfo(torch.float32).tiny  # all scores alike: no token is salient
    score = score - score.masked_fill(protected, torch.inf).amin(1, keepdim=True)
    score = score / score.masked_fill(protected, -torch.inf).amax(1, keepdim=True).clamp_min(tiny)
    among = (~protected).float()
    above = score - (score * among).sum(1, keepdim=True) / among.sum(1, keepdim=True)
    above = above / above.masked_fill(protected, -torch.inf).amax(1, keepdim=True).clamp_min(tiny)
    return above.clamp_min(0)
