"""Token merging as ordinary PyTorch: who merges into whom, and what comes out.

Bipartite matching as in ToMe (Bolya et al., 2023): tokens at even positions are sources, at odd ones destinations; each
source has an edge to its most similar destination, and the r strongest edges merge.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.select import places

Order = Literal["sequence", "even-odd", "strength"]


class Matched(NamedTuple):
    """Which r of N tokens merge into which.

    Args:
        sources: positions, [B, r].
        destinations: the position that each merges into.
        left: positions of the tokens left in their new order, [B, N - r].
        order: those, then the sources, [B, N].
        into: the place of each source's destination among the tokens left, [B, r].
        place: for each of the N tokens the place that now stands for it, [B, N].
    """

    sources: Tensor
    destinations: Tensor
    left: Tensor
    order: Tensor
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
    _, strong = _sorted(strength, descending=True)
    at = torch.arange(count, device=features.device)
    half = (at // 2).expand(batch, -1)  # a source's place among sources
    strong = strong.gather(1, half)
    leaves = (at % 2 == 0) & (strong < r)
    ordered, new = _sorted(torch.where(leaves, 4 * count + strong, _rank(at, strong, count, prefix, suffix, order)))
    left, sources = ordered[:, : count - r], ordered[:, count - r :]
    destinations = 2 * to.gather(1, sources // 2) + 1
    stands = torch.where(leaves, 2 * to.gather(1, half) + 1, at)
    return Matched(sources, destinations, left, ordered, new.gather(1, destinations), new.gather(1, stands))


def _sorted(key: Tensor, descending: bool = False) -> tuple[Tensor, Tensor]:
    """Positions in a stable order of their keys [B, N], and for each position its place in that order."""
    if key.device.type != "cpu":
        return by_counting(key, descending)
    order = key.sort(dim=1, descending=descending, stable=True).indices
    at = torch.arange(key.shape[1], device=key.device)
    return order, torch.empty_like(order).scatter(1, order, at.expand_as(order))


def by_counting(key: Tensor, descending: bool = False) -> tuple[Tensor, Tensor]:
    """The same without a sort: how many keys come before each one, and the inverse of that.

    For a GPU: two kernels for any N, in which N x N comparisons are less than the passes of a sort.
    """
    at, place = torch.arange(key.shape[1], device=key.device), places(key, descending)
    return torch.where(place.unsqueeze(1) == at.unsqueeze(1), at, 0).sum(2), place


def _rank(at: Tensor, strong: Tensor, count: int, prefix: int, suffix: int, order: Order) -> Tensor:
    """What the tokens left are sorted by, below 4 * count; protected ends stay at the ends.

    Args:
        at: positions [N].
        strong: a source's place by strength, [B, N].
    """
    if order == "sequence":  # no token at the ends merges, so these stand where they always stand
        return at
    rank = torch.where(at % 2 == 0, strong if order == "strength" else at, at + count)
    rank = torch.where(at < prefix, at - count, rank)
    return torch.where(at >= count - suffix, at + 2 * count, rank)


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
    # at full length: the copy is part of the kernel that makes the order
    sizes = sizes.gather(1, matched.order).scatter_add(1, into, share)[:, : left.shape[1]]

    def rows(index: Tensor) -> Tensor:
        return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])

    wide = torch.promote_types(x.dtype, torch.float32)
    apart = x.gather(1, rows(sources)).to(wide) - x.gather(1, rows(matched.destinations)).to(wide)
    share = (share / sizes.gather(1, into)).to(wide).unsqueeze(-1)
    # added at full length: the copy is part of the kernel that makes x, and the next norm gathers
    merged = x.to(wide).scatter_add(1, rows(matched.destinations), apart * share)
    return merged.gather(1, rows(left)).to(x.dtype), sizes


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
