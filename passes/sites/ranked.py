"""Merging along an order: a score says which tokens may merge, not their place in the sequence (PiToMe, DiffRate)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.sites.matching import Matched

Energy = Literal["paper", "code"]


def energy(near: Tensor, protected: Tensor, margin: float, form: Energy) -> Tensor:
    """PiToMe's energy: how many tokens are much like this one; [B, N] from cosines [B, N, N], protected ones left out.

    The mean over tokens j of cos_ij - m ("code") or cos_ij itself ("paper") where that is at least m, and of
    exp(cos_ij - m) - 1 below it. A token's cosine to itself is in it, the same for all.
    """
    above = near if form == "paper" else near - margin
    of_pairs = torch.where(near >= margin, above, torch.expm1(near - margin))
    return of_pairs.masked_fill(protected.expand(near.shape[:2]).unsqueeze(1), 0).mean(2)


def by_energy(
    keys: Tensor,
    protected: Tensor,
    r: int,
    prefix: int,
    free: int,
    margin: float,
    form: Energy,
    spare: bool,
) -> Matched:
    """PiToMe's matching: in the order of energy, tokens at even places are sources, at odd ones destinations.

    Args:
        keys: what is compared, [B, N, D].
        protected: [N] or [B, N] bool, true where a token neither merges nor is merged into.
        r: how many merge away, at most half of `free`.
        prefix: protected tokens in front.
        free: how many tokens are not protected.
        margin, form: see `energy`.
        spare: only the 2 r tokens of the highest energy take part, and every source merges; if not, all take part and
            the r strongest edges merge.
    """
    unit = F.normalize(keys.detach().float(), dim=-1)
    near = unit @ unit.transpose(1, 2)
    order = _highest_first(energy(near, protected, margin, form), protected, prefix)
    front, among, rest = order.split([prefix, free, order.shape[1] - prefix - free], 1)
    part = among[:, : 2 * r] if spare else among
    sources, destinations = part[:, ::2], part[:, 1::2]
    rows = near.gather(1, sources.unsqueeze(2).expand(-1, -1, near.shape[2]))
    strength, to = rows.gather(2, destinations.unsqueeze(1).expand(-1, sources.shape[1], -1)).max(-1)
    to = destinations.gather(1, to)
    if spare:
        return _matched([front, among[:, 2 * r :], destinations, rest], sources, to)
    strongest = strength.sort(dim=1, descending=True, stable=True).indices
    sources, to = sources.gather(1, strongest), to.gather(1, strongest)
    return _matched([front, sources[:, r:], destinations, rest], sources[:, :r], to[:, :r])


def by_rank(
    x: Tensor, scores: Tensor, protected: Tensor, merge: int, prune: int, prefix: int, free: int
) -> tuple[Matched, Tensor]:
    """DiffRate's: the `prune` tokens of the lowest score are dropped, the `merge` ones above them merge into the rest.

    Args:
        x: what is compared, [B, N, C].
        scores: [B, N].
        protected, prefix, free: see `by_energy`.

    Returns:
        The match, in which dropped tokens stand for themselves, behind all others, and each source's cosine [B, merge].
    """
    order = _highest_first(scores.detach().float(), protected, prefix)
    parts = [prefix, free - merge - prune, merge, prune, order.shape[1] - prefix - free]
    front, kept, sources, dropped, rest = order.split(parts, 1)
    unit = F.normalize(x.detach().float(), dim=-1)

    def of(index: Tensor) -> Tensor:
        return unit.gather(1, index.unsqueeze(2).expand(-1, -1, unit.shape[2]))

    strength, to = (of(sources) @ of(kept).transpose(1, 2)).max(-1)
    return _matched([front, kept, rest], sources, kept.gather(1, to), dropped), strength


def _highest_first(scores: Tensor, protected: Tensor, prefix: int) -> Tensor:
    """Positions [B, N]: the protected tokens in front, the others by score, further protected ones; ties as they were.

    A score that is not a number counts as the highest.
    """
    at = torch.arange(scores.shape[1], device=scores.device)
    top = torch.finfo(torch.float32).max
    key = torch.nan_to_num(scores, nan=top, posinf=top, neginf=-top).masked_fill(protected, -torch.inf)
    return key.masked_fill(at < prefix, torch.inf).sort(dim=1, descending=True, stable=True).indices


def _matched(left: list[Tensor], sources: Tensor, destinations: Tensor, dropped: Tensor | None = None) -> Matched:
    stays = torch.cat(left, 1)
    order = torch.cat([stays, sources] if dropped is None else [stays, sources, dropped], 1)
    at = torch.arange(order.shape[1], device=order.device).expand_as(order)
    new = torch.empty_like(order).scatter(1, order, at)
    return Matched(sources, destinations, stays, at.scatter(1, sources, destinations), new)
