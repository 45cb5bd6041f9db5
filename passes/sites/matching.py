"""Token merging as ordinary PyTorch: who merges into whom, and what comes out.

Bipartite matching as in ToMe (Bolya et al., 2023): tokens at even positions are sources, at odd ones destinations; each
source has an edge to its nearest destination, and the r strongest edges merge. How near is a cosine, or Ward's cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.sites.select import places

Order = Literal["sequence", "even-odd", "strength"]


class Matched(NamedTuple):
    """Which r of N tokens merge into which.

    Args:
        sources: positions, [B, r].
        destinations: the position that each merges into.
        left: positions of the tokens left in their new order, [B, N - r].
        stands: for each of the N tokens the position that now stands for it, [B, N].
        new: the place of each token in the new order, those that merge away behind those left, [B, N].
        over: what a GPU writes into the new order over, [B, N] float32; None on CPU.
    """

    sources: Tensor
    destinations: Tensor
    left: Tensor
    stands: Tensor
    new: Tensor
    over: Tensor | None = None

    @property
    def place(self) -> Tensor:
        """For each of the N tokens the place among those left of the one that stands for it, [B, N]."""
        return self.new.gather(1, self.stands)


def most(count: int, prefix: int, suffix: int, extra: int) -> int:
    """How many of `count` tokens may merge away: the unprotected sources, if a destination is left."""
    protected = [i < prefix or i >= count - suffix for i in range(count)]
    sources, destinations = (sum(not p for p in protected[start::2]) for start in (0, 1))
    half = (sources + destinations) // 2  # ToMe's and vid-TLDR's limit, where sources outnumber destinations
    # where the protected tokens between are after earlier sites is not known
    return max(0, min(sources, half) - extra) if destinations > extra else 0


def cosine(features: Tensor) -> Tensor:
    """How near tokens at even positions are to those at odd ones: [B, N, D] -> [B, S, T] float32."""
    features = F.normalize(features.detach().float(), dim=-1).to(features.dtype)
    return (features[:, ::2] @ features[:, 1::2].transpose(1, 2)).float()


def ward(features: Sequence[Tensor], sizes: Tensor, weights: Tensor | None, autocast: bool = False) -> Tensor:
    """The same by Ward's cost (Ward, 1963), negative: what a merge adds to the squared distances from the means.

    (n_a n_b / (n_a + n_b)) |f_a - f_b|^2 sqrt(max(w_a, w_b)). Features are compared in float32: in half precision
    squares would overflow, and differences of near tokens vanish.

    Args:
        features: f, in parts [B, N, D]: no copy joins them.
        sizes: n, [B, N] float32.
        weights: w, [B, N] float32, at least 0, on any scale of a sample's own; None for 1.
        autocast: products may run in half precision all the same, so that they must be small.
    """
    count = sum(part.shape[-1] for part in features) if autocast else 1
    parts = [part.detach().to(_wide(part)) for part in features]
    parts = [part * count**-0.5 for part in parts] if autocast else parts
    square = reduce(torch.add, [part.square().sum(-1) for part in parts])
    product = reduce(torch.add, [part[:, ::2] @ part[:, 1::2].transpose(1, 2) for part in parts])
    apart = (square[:, ::2, None] + square[:, None, 1::2] - 2 * product).clamp_min(0).float()
    from_, to = sizes[:, ::2, None], sizes[:, None, 1::2]
    cost = apart * (count * from_ * to / (from_ + to))
    if weights is not None:
        weights = weights.detach().sqrt()
        cost = cost * torch.maximum(weights[:, ::2, None], weights[:, None, 1::2])
    return -cost


def match(similar: Tensor, protected: Tensor, r: int, prefix: int, suffix: int, order: Order) -> Matched:
    """Finds the r strongest edges between tokens at even and at odd positions; ties go to the earlier token.

    Args:
        similar: how near tokens at even positions are to those at odd ones, [B, S, T] float32.
        protected: [N] or [B, N] bool, true where a token neither merges nor is merged into.
        r: at most `most(...)`.
        prefix, suffix: protected tokens at either end, which stay there.
        order: of the tokens left: as they were ("sequence"); ToMe's and vid-TLDR's, which decides their next
            pairing: even positions, then odd ones ("even-odd"), the even ones by edge strength where ToMe has no
            class token ("strength").
    """
    batch, count = similar.shape[0], similar.shape[1] + similar.shape[2]
    protected = protected.expand(batch, count)
    similar = similar.masked_fill(protected[:, ::2, None] | protected[:, None, 1::2], -torch.inf)
    strength, to = similar.max(-1)  # the first of equals
    at = torch.arange(count, device=similar.device)
    half = at // 2  # a source's place among sources
    strong, over = _by_strength(strength, half)
    leaves = (at % 2 == 0) & (strong < r)
    key = torch.where(leaves, 4 * count + strong, _rank(at, strong, count, prefix, suffix, order))
    if over is None:
        ordered = key.sort(dim=1).indices
        new = _inverse(ordered)
    else:
        new = places(key)
        ordered = _moved(at, new, over).long()
    left, sources = ordered[:, : count - r], ordered[:, count - r :]
    destinations = 2 * to.gather(1, sources // 2) + 1
    stands = torch.where(leaves, 2 * to.gather(1, half.expand(batch, -1)) + 1, at)
    return Matched(sources, destinations, left, stands, new, over)


def _by_strength(strength: Tensor, half: Tensor) -> tuple[Tensor, Tensor | None]:
    """For each token [N] the place of source `half` [N] among sources by strength [B, S], the strongest first.

    On a GPU by comparing every two, less work than the passes of a sort, and for every token at once, so that the next
    kernel can make the new order. That one writes over numbers which this one makes for it,
    or it would be two.
    """
    if not _compares(strength.device):
        return _inverse(strength.sort(dim=1, descending=True, stable=True).indices)[:, half], None
    mine, other = strength[:, half].unsqueeze(2), strength.unsqueeze(1)
    same, earlier = other == mine, torch.arange(strength.shape[1], device=strength.device) < half.unsqueeze(1)
    return ((other > mine) | same & earlier).sum(2), same.sum(2, dtype=torch.float32)


def _compares(device: torch.device) -> bool:
    return device.type != "cpu"


def _moved(values: Tensor, new: Tensor, over: Tensor) -> Tensor:
    """Values of each token in the new order, float32, exact up to 2**24."""
    return over.scatter(1, new, values.to(over.dtype).expand_as(new))


def _inverse(order: Tensor) -> Tensor:
    at = torch.arange(order.shape[1], device=order.device)
    return torch.empty_like(order).scatter(1, order, at.expand_as(order))


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


def merge(
    values: Sequence[Tensor], sizes: Tensor, matched: Matched, weights: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """The tokens left, each the weighted mean of what merged into it, and their sizes.

    x_b <- (n_b x_b + sum_a s_a n_a x_a) / (n_b + sum_a s_a n_a), n_b <- n_b + sum_a s_a n_a over the sources a of b. A
    token that nothing merges into is unchanged, to the bit.

    Args:
        values: each x, [B, N, C].
        sizes: n, [B, N] float32.
        weights: s, [B, N] float32 (vid-TLDR's saliency); None for 1: then sizes sum to the number of tokens.

    Returns:
        Of each value [B, N - r, C], and the sizes [B, N - r].
    """
    sources, destinations = matched.sources, matched.destinations
    share = sizes.gather(1, sources)
    if weights is not None:
        share = share * weights.gather(1, sources)
    all_sizes, sizes = grown(sizes, share, weights, matched)

    def rows(index: Tensor, like: Tensor) -> Tensor:
        return index.unsqueeze(-1).expand(-1, -1, like.shape[-1])

    def taken(index: Tensor) -> Tensor:
        return torch.cat([v.gather(1, rows(index, v)).to(_wide(v)) for v in values], -1)

    apart = taken(sources) - taken(destinations)
    added = apart * (share / all_sizes.gather(1, destinations)).to(apart.dtype).unsqueeze(-1)
    if len(values) == 1:
        # added at full length: the copy is part of the kernel that makes x, and the next norm gathers
        (x,) = values
        merged = x.to(added.dtype).scatter_add(1, rows(destinations, added), added)
        merged = merged.gather(1, rows(matched.left, merged))
    else:  # what reads them gathers nothing
        merged = taken(matched.left).scatter_add(1, rows(matched.new.gather(1, destinations), added), added)
    parts = merged.split([v.shape[-1] for v in values], -1)
    return [part.to(v.dtype) for part, v in zip(parts, values, strict=True)], sizes


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def grown(sizes: Tensor, share: Tensor, weights: Tensor | None, matched: Matched) -> tuple[Tensor, Tensor]:
    """Each token's size with what its sources add to it, at its position [B, N] and of those left [B, N - r].

    Args:
        share: what each source adds, [B, r].
    """
    left = matched.left
    if matched.over is None:
        sizes = sizes.scatter_add(1, matched.destinations, share)
        return sizes, sizes.gather(1, left)
    # by comparing as well, in the kernel that makes the order
    at, stands = torch.arange(sizes.shape[1], device=sizes.device), matched.stands
    shares = sizes if weights is None else torch.where(stands == at, sizes, sizes * weights)
    sizes = torch.where(stands.unsqueeze(1) == at.unsqueeze(1), shares.unsqueeze(1), 0).sum(2)
    return sizes, _moved(sizes, matched.new, matched.over)[:, : left.shape[1]]


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
