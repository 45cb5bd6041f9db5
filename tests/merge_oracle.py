"""The oracle of merging: ToMe, vid-TLDR, Ward, and matching on the stream by hand, in eager PyTorch on its modules.

Written from the papers' rules, token by token in Python loops; it shares no code with the compiler. Matching is in
double precision, and `Stream.margin` says how far the nearest decision was from going the other way: where that is
about float error, the compiler may rightly decide otherwise.
Shapes: B samples, n current tokens (of N at first), H heads, C channels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import oracle
import torch
from torch import Tensor

Merger = Literal["stream", "tome", "vid-tldr", "ward"]
Importance = Literal["shift", "attention-entropy", "class-attention", "mean-attention"]
QKV = tuple[Tensor, Tensor, Tensor, Tensor | None]  # [B, H, n, d] each, and what is added to the logits


@dataclass(frozen=True)
class Merging:
    """What merges and what is pruned: r tokens in each block of `merge`, keep ratios in `keep`.

    Args:
        prefix: tokens in front that neither merge nor are pruned.
        extra: further original positions of which the same holds.
    """

    merge: Mapping[int, int] = field(default_factory=dict)
    merger: Merger = "stream"
    keep: Mapping[int, float] = field(default_factory=dict)
    operation: oracle.Operation = "mlp"
    metric: oracle.Metric = "l2"
    with_skip: bool = False
    importance: Importance = "shift"
    size_bias: bool = True
    weighted_mean: bool = False
    restore: Literal["change", "copy"] = "change"
    prefix: int = 0
    extra: tuple[int, ...] = ()

    @property
    def between(self) -> bool:
        """Whether tokens merge between attention and MLP."""
        return self.merger != "ward" and not self.after_block

    @property
    def after_block(self) -> bool:
        """Whether tokens merge after the MLP."""
        shift_known_late = self.importance == "shift" and self.operation != "attention"
        return self.merger == "stream" or (self.merger == "vid-tldr" and shift_known_late)


@dataclass(frozen=True)
class Pairs:
    """Which tokens of one sample merge: (source, destination) pairs, who is left in which order, and how clearly."""

    merged: list[tuple[int, int]]
    left: list[int]
    margin: float


def match(features: Tensor, guarded: set[int], r: int, merger: Merger, prefix: int) -> Pairs:
    """Bipartite matching of one sample's features [n, D]: even positions against odd ones, by cosine."""
    unit = features.detach().double()
    unit = unit / unit.norm(dim=-1, keepdim=True)
    return match_by(unit @ unit.T, guarded, r, merger, prefix)


def match_ward(features: Tensor, sizes: Tensor, shift: Tensor | None, guarded: set[int], r: int) -> Pairs:
    """The r cheapest edges of one sample, features [n, D], sizes and shift [n], by Ward's cost times sqrt(shift).

    The margin is in shares of the dearest edge that merges.
    """
    f, s = features.detach().double(), sizes.double()
    free = [t for t in range(len(f)) if t not in guarded]
    w = torch.ones_like(s) if shift is None else shift.detach().double() / shift.detach().double()[free].mean()
    cost = torch.zeros(len(f), len(f), dtype=torch.double)
    for a in free:
        apart = (f - f[a]).square().sum(-1)
        cost[a] = s[a] * s / (s[a] + s) * apart * torch.maximum(w[a], w).sqrt()
    scale = cost[free][:, free].mean()
    return match_by(-cost / scale, guarded, r, "ward", 0)


def match_by(near: Tensor, guarded: set[int], r: int, merger: Merger, prefix: int) -> Pairs:
    """Bipartite matching by how near each token is to each, [n, n]."""
    cosine = near.tolist()
    n = len(cosine)
    margin = math.inf
    edges: list[tuple[float, int, int, float]] = []  # strength, source, destination, lead over the second best
    for a in range(0, n, 2):
        options = sorted((-cosine[a][b], b) for b in range(1, n, 2) if b not in guarded)
        if a in guarded or not options:
            continue
        lead = options[1][0] - options[0][0] if len(options) > 1 else math.inf
        edges.append((-options[0][0], a, options[0][1], lead))
    edges.sort(key=lambda edge: -edge[0])  # stable: the earlier of equals first
    for _, _, _, lead in edges[:r]:
        margin = min(margin, lead)
    if 0 < r < len(edges):
        margin = min(margin, edges[r - 1][0] - edges[r][0])
    pairs = [(a, b) for _, a, b, _ in edges[:r]]
    sources = {a for a, _ in pairs}
    if merger in ("stream", "ward"):
        return Pairs(pairs, [t for t in range(n) if t not in sources], margin)
    if merger == "tome" and prefix == 0:  # not sorted without a class token: the strongest of the unmerged first
        evens = [a for _, a, _, _ in edges[r:]]
        evens += [a for a in range(0, n, 2) if a not in sources and a not in evens]
        margin = min([margin, *(x[0] - y[0] for x, y in zip(edges[r:], edges[r + 1 :], strict=False))])
    else:
        evens = [a for a in range(0, n, 2) if a not in sources]
    odds = list(range(1, n, 2))
    front = list(range(prefix))
    return Pairs(pairs, front + [t for t in evens + odds if t >= prefix], margin)


def saliency(score: list[float], guarded: set[int]) -> list[float]:
    """vid-TLDR's steps 3 and 4 on one sample's scores; guarded tokens take no part."""
    own = [s for t, s in enumerate(score) if t not in guarded]
    low = min(own)
    high = max(s - low for s in own)
    score = [(s - low) / high if high else 0.0 for s in score]
    own = [s for t, s in enumerate(score) if t not in guarded]
    mean = sum(own) / len(own)
    top = max(s - mean for s in own)
    return [(s - mean) / top if top and s >= mean else 0.0 for s in score]


def entropy(attention: Tensor) -> Tensor:
    """sum_j A_ij log A_ij of the head mean A: [B, n] from [B, H, n, n]."""
    mean = attention.mean(1)
    return torch.where(mean > 0, mean * mean.clamp_min(1e-37).log(), 0).sum(-1)


class Stream:
    """The residual stream while tokens merge and leave, and what stands for each of the tokens that the model has."""

    def __init__(self, tokens: Tensor) -> None:
        batch, n, _ = tokens.shape
        self.tokens = tokens
        self.sizes = torch.ones(batch, n, dtype=tokens.dtype)
        self.index = torch.arange(n).repeat(batch, 1)
        self.margin = math.inf
        # for each original token the position of the token that stands for it, or the value with which that left
        self.stands: list[list[int | Tensor]] = [list(range(n)) for _ in range(batch)]
        # and what each was apart from it when it merged
        self.apart: list[list[Tensor | float]] = [[0.0] * n for _ in range(batch)]
        self.whole = tokens  # at the end: all tokens, restored
        self.shift: Tensor | None = None  # the last block's, of its MLP, [B, n]

    def guarded(self, sample: int, how: Merging) -> set[int]:
        at = self.index[sample].tolist()
        return {t for t, original in enumerate(at) if original < how.prefix or original in how.extra}

    def merge(
        self,
        how: Merging,
        r: int,
        features: Tensor,
        scores: Tensor | None,
        beside: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """features [B, n, D]; scores [B, n] where sources are weighted (vid-TLDR).

        Args:
            beside: values [B, n, ...] that merge as the tokens do; returned, merged.
        """
        rows, sizes, index, others, shifts = [], [], [], [], []
        for b in range(len(self.tokens)):
            guarded = self.guarded(b, how)
            if how.merger == "ward":
                shift = None if self.shift is None else self.shift[b]
                found = match_ward(features[b], self.sizes[b], shift, guarded, r)
            else:
                found = match(features[b], guarded, r, how.merger, how.prefix)
            self.margin = min(self.margin, found.margin)
            weight = [1.0] * len(features[b]) if scores is None else saliency(scores[b].tolist(), guarded)
            now, size = [], []
            for t in found.left:
                total = self.sizes[b, t]
                values = [x[b, t] for x in (self.tokens, *beside)]
                sources = [a for a, to in found.merged if to == t]
                if sources:
                    share = [weight[a] * self.sizes[b, a] for a in sources]
                    total = total + sum(share)
                    for i, x in enumerate((self.tokens, *beside)):
                        parts = [s * x[b, a] for s, a in zip(share, sources, strict=True)]
                        values[i] = (self.sizes[b, t] * x[b, t] + sum(parts)) / total
                now.append(values)
                size.append(total)
            place = {t: i for i, t in enumerate(found.left)}
            place |= {a: place[to] for a, to in found.merged}
            for t, s in enumerate(self.stands[b]):
                if isinstance(s, int):
                    self.stands[b][t] = place[s]
                    if how.restore == "change":
                        self.apart[b][t] = self.apart[b][t] + self.tokens[b, s] - now[place[s]][0]
            rows.append(torch.stack([values[0] for values in now]))
            others.append([torch.stack([values[i + 1] for values in now]) for i in range(len(beside))])
            sizes.append(torch.stack(size))
            index.append(self.index[b, found.left])
            shifts.append(found.left)
        self.tokens, self.sizes, self.index = torch.stack(rows), torch.stack(sizes), torch.stack(index)
        self._shift_of(shifts)
        return [torch.stack(parts) for parts in zip(*others, strict=True)]

    def _shift_of(self, left: list[list[int]]) -> None:
        """The shift of the tokens left: of merged ones the destination's."""
        if self.shift is not None:
            self.shift = torch.stack([shift[at] for shift, at in zip(self.shift, left, strict=True)])

    def prune(self, how: Merging, score: Tensor, keep: float) -> None:
        n = self.tokens.shape[1]
        count = oracle.keep_count(n, keep)
        kept = []
        for b in range(len(self.tokens)):
            guarded = self.guarded(b, how)
            values = score[b].detach().tolist()
            order = sorted((t for t in range(n) if t not in guarded), key=lambda t: -values[t])
            stay = sorted([*guarded, *order[: count - len(guarded)]])
            gone = order[count - len(guarded) :]
            if gone and count > len(guarded):
                scale = max(abs(values[t]) for t in order)
                self.margin = min(self.margin, (values[order[count - len(guarded) - 1]] - values[gone[0]]) / scale)
            place = {t: i for i, t in enumerate(stay)}
            self.stands[b] = [
                s if not isinstance(s, int) else place[s] if s in place else self.tokens[b, s] for s in self.stands[b]
            ]
            kept.append(stay)
        rows = range(len(kept))
        self.tokens = torch.stack([self.tokens[b, kept[b]] for b in rows])
        self.sizes = torch.stack([self.sizes[b, kept[b]] for b in rows])
        self.index = torch.stack([self.index[b, kept[b]] for b in rows])
        self._shift_of(kept)

    def restored(self) -> Tensor:
        """[B, N, C]: every merged token as it was plus its destination's change, every pruned one as it left."""
        return torch.stack(
            [
                torch.stack(
                    [
                        (self.tokens[b, s] if isinstance(s, int) else s) + apart
                        for s, apart in zip(stands, self.apart[b], strict=True)
                    ]
                )
                for b, stands in enumerate(self.stands)
            ]
        )

    def mean(self, x: Tensor, how: Merging, first: int = 0) -> Tensor:
        """Mean over the tokens of x [B, n, C] from `first` on, weighted by size if the schedule says so."""
        if not how.weighted_mean:
            return x[:, first:].mean(1)
        weight = self.sizes[:, first:, None]
        return (weight * x[:, first:]).sum(1) / weight.sum(1)


def attend(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T / sqrt d + added + log sizes) V as [B, n, H d], and the map without the sizes."""
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if added is not None:
        logits = logits + added
    biased = logits if sizes is None else logits + sizes.log()[:, None, None, :]
    return (biased.softmax(-1) @ v).transpose(1, 2).flatten(2), logits.softmax(-1)


@dataclass(frozen=True)
class Parts:
    """A model taken apart: x = norm2?(norm1?(x + attention) + mlp) a block, and what it returns."""

    embed: Callable[[Tensor], Tensor]
    layers: Iterable[Any]
    qkv: Callable[[Any, Tensor, Tensor], QKV]  # layer, stream [B, n, C], original positions [B, n]
    out: Callable[[Any, Tensor], Tensor]  # what attention's [B, n, C] adds to the stream
    mlp: Callable[[Any, Tensor], Tensor]
    outputs: Callable[[Stream, Merging], dict[str, Tensor]]
    middle_norm: Callable[[Any, Tensor], Tensor] = lambda layer, x: x
    end_norm: Callable[[Any, Tensor], Tensor] = lambda layer, x: x
    parallel: bool = False


@dataclass
class Result:
    """What the model should return, by name; the stream at its end; how clearly it was decided."""

    outputs: dict[str, Tensor]
    stream: Stream

    @property
    def margin(self) -> float:
        return self.stream.margin


def run(parts: Parts, images: Tensor, how: Merging) -> Result:
    """The model's forward with `how` done to it by hand."""
    stream = Stream(parts.embed(images))
    last: Any = None
    for i, layer in enumerate(parts.layers):
        start = stream.tokens if last is None else parts.end_norm(last, stream.tokens)
        last = layer
        q, k, v, added = parts.qkv(layer, start, stream.index)
        r = how.merge.get(i, 0)
        if r and how.merger == "ward":
            assert not parts.parallel
            stream.tokens = start
            rows = [x.transpose(1, 2) for x in (q, k, v)]
            features = torch.cat([x.flatten(2) for x in rows[1:]], -1)
            merged = stream.merge(how, r, features, None, rows)
            start, (q, k, v) = stream.tokens, (x.transpose(1, 2) for x in merged)
            added = parts.qkv(layer, start, stream.index)[3]
        mixed, map_ = attend(q, k, v, added, stream.sizes if how.size_bias else None)
        attention = parts.out(layer, mixed)
        stream.tokens = start + attention

        def scores(start=start, attention=attention, map_=map_, middle=None, mlp=None, end=None) -> Tensor:
            if how.importance == "attention-entropy":
                return entropy(map_)
            if how.importance == "class-attention":
                return map_[:, :, 0].mean(1)
            if how.importance == "mean-attention":
                return map_.mean((1, 2))
            pruning = oracle.Pruning({}, how.operation, how.metric, how.with_skip)
            return oracle.score_of(pruning, start, attention, middle, mlp, end)

        if r and how.between:
            assert not parts.parallel
            features = stream.tokens if how.merger == "vid-tldr" else k.mean(1)
            stream.merge(how, r, features, scores().detach() if how.merger == "vid-tldr" else None)
        middle = start if parts.parallel else parts.middle_norm(layer, stream.tokens)
        mlp = parts.mlp(layer, middle)
        stream.tokens = start + attention + mlp if parts.parallel else middle + mlp
        late = {"middle": middle, "mlp": mlp, "end": stream.tokens}
        stream.shift = oracle.distance(mlp, middle, "l2")
        if r and how.after_block:
            weights = scores(**late).detach() if how.merger == "vid-tldr" else None
            stream.merge(how, r, stream.tokens, weights)
        if i in how.keep:
            stream.prune(how, scores(**late), how.keep[i])
    end = copy.copy(stream)
    end.tokens = parts.end_norm(last, stream.tokens)
    end.whole = parts.end_norm(last, stream.restored())
    return Result(parts.outputs(end, how), stream)
