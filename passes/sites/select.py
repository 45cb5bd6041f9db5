"""Which tokens stay: the highest scores, protected tokens always, in their order."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from passes.graph.facts import Fact

Way = Literal["topk", "sorts", "compares"]

MANY: Fact[bool] = Fact("many")  # of graphs: whether calls bring more than FEW samples
FEW = 256  # samples whose tokens, or rows and columns, Inductor sorts a row at a time
_IN_REGISTERS = 512  # tokens up to which Inductor makes one GPU kernel of both sorts


def protected_mask(
    count: int, prefix: int, suffix: int, extra: tuple[int, ...], positions: Tensor | None, device: torch.device
) -> Tensor:
    """[N] or [B, N], true where a token must stay.

    Args:
        count: tokens now, N.
        prefix, suffix: that many at either end always stay.
        extra: further original positions that always stay.
        positions: [B, N] original position of each token, None before the first prune.
        device: of the stream.
    """
    at = torch.arange(count, device=device)
    mask = (at < prefix) | (at >= count - suffix)
    for position in extra:
        mask = mask | ((at if positions is None else positions) == position)
    return mask


def way(device: torch.device, count: int, many: bool) -> Way:
    """How the highest of `count` scores are found; on CPU by topk, twice as fast as sorts.

    Args:
        many: there may be more than 512 rows. Inductor sorts four of a thousand rows in one warp, in a program that
            ptxas was not through with after six minutes; comparing takes one kernel more, little beside so many rows.
    """
    if device.type == "cpu":
        return "topk"
    if many:
        return "compares"
    without = device.type == "mps"  # float64, which the keys of topk are
    return "sorts" if without or count <= _IN_REGISTERS else "topk"


def shortest_row(device: torch.device) -> int:
    """Such a row Inductor sorts by itself, of shorter ones up to 4096 entries at once: ptxas needs minutes for that."""
    return 0 if device.type == "cpu" else 129


def keep_highest(
    score: Tensor,
    protected: Tensor | None,
    keep: int,
    lowest: bool = False,
    padding: Tensor | None = None,
    many: bool = False,
    how: Way | None = None,
) -> Tensor:
    """Positions of the `keep` highest scores, ascending; ties go to the earlier token.

    A NaN or infinite score counts as the highest: what the dense model would have spread must not vanish.

    Args:
        score: [B, N].
        protected: [N] or [B, N] bool; at most `keep` of them. None: `score.shift` marked them.
        keep: how many stay.
        lowest: keep the lowest scores instead (a baseline).
        padding: [B, N] bool, tokens that go before all others; protected ones stay.
        many: see `way`.
        how: the way to find them; None for what `way` says.

    Returns:
        [B, keep] int64.
    """
    if protected is not None:
        score = _marked(score, protected, lowest, padding)
    count = score.shape[1]
    at = torch.arange(count, device=score.device)
    how = how or way(score.device, count, many)
    if how == "compares":
        # as _ordered_keys, but a kernel less: NaN above all
        key = torch.where(score.isnan(), torch.inf, score.clamp(max=torch.finfo(torch.float32).max))
        return _first(places(key, descending=True) < keep, keep)
    if how == "topk":
        kept = _ordered_keys(score, count - at).topk(keep, dim=1, sorted=False).indices
        return _by_itself(kept, count).sort(dim=1).values[:, :keep]
    order = _by_itself(score, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    at = torch.arange(order.shape[1], device=score.device)
    return torch.where(at < keep, order, order + count).sort(dim=1).values[:, :keep]


def centred(index: Tensor, protected: Tensor) -> Tensor:
    """Kept positions [B, K] with the one protected token ([N] or [B, N] bool) in the middle, the others in order."""
    batch, keep = index.shape
    it = protected.expand(batch, -1).gather(1, index)
    place = torch.cumsum(~it, 1) - 1  # among the others
    place = torch.where(it, keep // 2, place + (place >= keep // 2))
    return index.scatter(1, place, index)


def _first(stays: Tensor, keep: int) -> Tensor:
    """Positions [B, keep] of the `keep` true entries of [B, N], in order, without a sort."""
    at = torch.arange(stays.shape[1], device=stays.device)
    before = (stays.unsqueeze(1) & (at < at.unsqueeze(1))).sum(2)
    place = torch.where(stays, before, keep + at - before)
    # into int32, since Inductor leaves int64 to a kernel of its own, and into what the first kernel makes on the way
    order = stays.int().scatter(1, place, at.int().expand_as(place))
    return order[:, :keep].long()


def places(key: Tensor, descending: bool = False) -> Tensor:
    """Each entry's place in a stable order of its row [R, N], by comparing every two; NaN has none."""
    at = torch.arange(key.shape[1], device=key.device)
    mine, other = key.unsqueeze(2), key.unsqueeze(1)
    ahead = other > mine if descending else other < mine
    return (ahead | (other == mine) & (at < at.unsqueeze(1))).sum(2)


def _by_itself(x: Tensor, last: float) -> Tensor:
    """[B, N], where rows are too short with what a stable sort leaves last behind them."""
    count, least = x.shape[1], shortest_row(x.device)
    if not 0 < count < least:
        return x
    at = torch.arange(least, device=x.device)
    return torch.where(at < count, x.gather(1, at.clamp(max=count - 1).expand(x.shape[0], -1)), last)


def _marked(score: Tensor, protected: Tensor, lowest: bool, padding: Tensor | None) -> Tensor:
    """Scores to select by: NaN, which sorts above all, for a protected token, infinite for one that is not finite."""
    score = _finite(score, lowest)
    if padding is not None:
        score = torch.where(padding, -torch.inf, score)
    return torch.where(protected, torch.nan, score)


def _finite(score: Tensor, lowest: bool) -> Tensor:
    """float32 without NaN; what is not finite counts as highest, in the order asked for."""
    score = -score.float() if lowest else score.float()
    least = torch.inf if lowest else torch.finfo(torch.float32).min
    return torch.nan_to_num(score, nan=torch.inf, posinf=torch.inf, neginf=least)


def _ordered_keys(score: Tensor, rank: Tensor) -> Tensor:
    """float64 that compare as the scores do, NaN above all, and equal scores as their rank: `topk` mixes up equals.

    A float32 has 24 bits, so of two neighbours the larger is larger by at least 2^-24 of itself; the last bits of a
    float64 are the rank's, below 2^27. No bits are read, which ONNX has no op for; and rounded to float32, as OpenVINO
    computes, keys still compare as the scores do.
    """
    score = torch.nan_to_num(score.double() * 0.25, nan=2.0**127, posinf=2.0**126, neginf=-(2.0**126))
    least = 2.0**-240  # for ranks of zeros; far below the last bit of anything else
    return score + (score.abs() + least) * (rank.double() * 2.0**-52)
