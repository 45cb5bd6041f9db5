"""The oracle of Zero-TPrune, PiToMe and DiffRate: timm ViTs run by hand, one sample and one token at a time.

Written from the rules of the papers and of their published code, in loops over Python lists; it shares no code with the
compiler. Scores are in double precision, and `Sample.margin` says how far the nearest decision was from going the
other way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Leaving:
    """What becomes of the tokens in one block: (source, destination) pairs, who is dropped, who is left in which order.

    Args:
        size_share: of each source, by what its size is multiplied before it is added.
        plain: means are of tokens, not weighted by sizes.
        gaps: how clearly it was decided.
    """

    left: list[int]
    merged: list[tuple[int, int]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    size_share: dict[int, float] = field(default_factory=dict)
    plain: bool = False
    gaps: list[float] = field(default_factory=list)


@dataclass
class Sample:
    """One sample in the middle of the network.

    Args:
        x: [n, C].
        sizes: of each token.
        stands: for each token of the model the token that stands for it and what was apart from it, or its last value.
        margin: of the nearest decision.
        copy: a merged token gets its destination's value back, not its own plus the destination's change.
    """

    x: Tensor
    sizes: list[float]
    stands: list[tuple[int, Tensor | float] | Tensor]
    margin: float = math.inf
    copy: bool = False

    def leave(self, how: Leaving) -> None:
        self.margin = min([self.margin, *how.gaps])
        now, sizes, place = [], [], {}
        for t in how.left:
            sources = [a for a, b in how.merged if b == t]
            weight = {s: 1.0 if how.plain else self.sizes[s] for s in (t, *sources)}
            now.append(sum(w * self.x[s] for s, w in weight.items()) / sum(weight.values()))
            sizes.append(self.sizes[t] + sum(self.sizes[s] * how.size_share.get(s, 1.0) for s in sources))
            place |= dict.fromkeys((t, *sources), len(now) - 1)
        for i, stand in enumerate(self.stands):
            if isinstance(stand, Tensor):
                continue
            at, apart = stand
            if at in place:
                self.stands[i] = (place[at], 0.0 if self.copy else apart + self.x[at] - now[place[at]])
            else:
                self.stands[i] = self.x[at] + apart
        self.x, self.sizes = torch.stack(now), sizes

    def whole(self) -> Tensor:
        return torch.stack([s if isinstance(s, Tensor) else self.x[s[0]] + s[1] for s in self.stands])


@dataclass(frozen=True)
class Seen:
    """What a rule may look at: the stream, the keys [H, n, d], the maps [H, n, n] without and with size bias."""

    block: int
    depth: int
    x: Tensor
    keys: Tensor
    plain: Tensor
    biased: Tensor
    prefix: int

    @property
    def free(self) -> list[int]:
        return list(range(self.prefix, len(self.x)))


Rule = Callable[[Seen], Leaving]


@torch.no_grad()
def run(
    model: Any,
    images: Tensor,
    between: Mapping[int, Rule],
    behind: Mapping[int, Rule],
    size_bias: bool = True,
    copy: bool = False,
) -> tuple[Tensor, Tensor, float]:
    """What the model's head and its last norm, all tokens put back, give, and the margin.

    Args:
        between: what is done between attention and MLP of a block.
        behind: what is done behind the complete block.
    """
    logits, tokens, margin = [], [], math.inf
    prefix = model.num_prefix_tokens
    for image in images:
        x = model._pos_embed(model.patch_embed(image[None]))[0]
        s = Sample(x, [1.0] * len(x), [(i, 0.0) for i in range(len(x))], copy=copy)
        for i, block in enumerate(model.blocks):
            attn, y = block.attn, block.norm1(s.x)
            q, k, v = attn.qkv(y).unflatten(-1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            plain = scores.softmax(-1)
            sizes = torch.tensor(s.sizes, dtype=x.dtype) if size_bias else torch.ones(len(s.x), dtype=x.dtype)
            biased = (scores + sizes.log()).softmax(-1)
            s.x = s.x + block.ls1(attn.proj((biased @ v).transpose(0, 1).flatten(1)))
            seen = Seen(i, len(model.blocks), s.x, k, plain, biased, prefix)
            if i in between:
                s.leave(between[i](seen))
            s.x = s.x + block.ls2(block.mlp(block.norm2(s.x)))
            if i in behind:
                s.leave(behind[i](seen))
        logits.append(model.forward_head(model.norm(s.x)[None])[0])
        tokens.append(model.norm(s.whole()))
        margin = min(margin, s.margin)
    return torch.stack(logits), torch.stack(tokens), margin


def cosines(x: Tensor) -> list[list[float]]:
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    return (unit @ unit.T).tolist()


def by(values: Mapping[int, float]) -> list[int]:
    """The highest first, the earlier of equals first."""
    return sorted(values, key=lambda t: -values[t])


def steps(values: list[float]) -> list[float]:
    """How far neighbours in an order are apart."""
    return [abs(a - b) for a, b in itertools.pairwise(values)]


def nearest(cos: list[list[float]], a: int, among: list[int]) -> tuple[int, float, float]:
    """The token most like a, the cosine, and the lead over the next one."""
    order = sorted(among, key=lambda b: -cos[a][b])
    lead = cos[a][order[0]] - cos[a][order[1]] if len(order) > 1 else math.inf
    return order[0], cos[a][order[0]], lead


def pitome(r: int, margin: float, form: str, spare: Callable[[int, int], bool]) -> Rule:
    """PiToMe: energy by keys, every second token of the 2 r highest merges, or the r strongest edges of all."""

    def rule(seen: Seen) -> Leaving:
        cos, free = cosines(seen.keys.mean(0)), seen.free
        m = margin - margin * seen.block / seen.depth
        energies = {}
        for i in free:
            terms = []
            for j in free:
                c = cos[i][j]
                terms.append((c if form == "paper" else c - m) if c >= m else math.exp(c - m) - 1)
            energies[i] = sum(terms) / len(cos)
        order = by(energies)
        gaps = steps([energies[t] for t in order])
        front = list(range(seen.prefix))
        if spare(seen.block, seen.depth):
            sources, others = order[0 : 2 * r : 2], order[1 : 2 * r : 2]
            found = {a: nearest(cos, a, others) for a in sources}
            pairs = [(a, found[a][0]) for a in sources]
            left = front + order[2 * r :] + others
        else:
            sources, others = order[::2], order[1::2]
            found = {a: nearest(cos, a, others) for a in sources}
            strongest = by({a: found[a][1] for a in sources})
            gaps += steps([found[a][1] for a in strongest])
            pairs = [(a, found[a][0]) for a in strongest[:r]]
            left = front + strongest[r:] + others
        return Leaving(left, pairs, gaps=gaps + [found[a][2] for a, _ in pairs])

    return rule


def diffrate(merge: int, drop: int, importance: Callable[[Seen], list[float]] | None = None) -> Rule:
    """DiffRate: the lowest of the class token's attention are dropped, those above them merge into the most similar."""

    def rule(seen: Seen) -> Leaving:
        values = seen.biased[:, 0].mean(0).tolist() if importance is None else importance(seen)
        order = by({t: values[t] for t in seen.free})
        kept = order[: len(order) - merge - drop]
        sources, dropped = order[len(kept) : len(kept) + merge], order[len(kept) + merge :]
        cos = cosines(seen.x)
        found = {a: nearest(cos, a, kept) for a in sources}
        gaps = [g / max(map(abs, values)) for g in steps([values[t] for t in order])]
        return Leaving(
            list(range(seen.prefix)) + kept,
            [(a, found[a][0]) for a in sources],
            dropped,
            {a: max(found[a][1], 0.0) for a in sources},
            True,
            gaps + [found[a][2] for a in sources],
        )

    return rule


def votes(attention: Tensor, alive: list[int], start: list[float], rounds: int) -> list[list[float]]:
    """PageRank of each head over the tokens alive, whose votes go to each other only; 0 for the others."""
    scores = []
    for head in attention.double().tolist():
        total = sum(start[i] for i in alive)
        s = {i: start[i] / total for i in alive}
        given = {i: sum(head[i][j] for j in alive) for i in alive}
        for _ in range(rounds):
            s = {j: sum(s[i] * head[i][j] / given[i] for i in alive) for j in alive}
        scores.append([s.get(i, 0.0) for i in range(len(head))])
    return scores


def joined(scores: list[list[float]], filtered: bool) -> list[float]:
    """The root of the mean of squares over heads, those that vary neither too little nor too much where filtered."""
    n = len(scores[0])
    if filtered:
        spread = [sum((n * v - sum(s)) ** 2 for v in s) / n for s in scores]
        scores = [s for s, v in zip(scores, spread, strict=True) if 0.01 <= v <= 0.7] or scores
    return [math.sqrt(sum(s[t] ** 2 for s in scores) / len(scores)) for t in range(n)]


def zero_tprune(leave: int, similar: int, rounds: int, class_start: bool = True, filtered: bool = False) -> Rule:
    """Zero-TPrune: I' and S stage for `similar` of the tokens, the I stage for the others."""

    def rule(seen: Seen) -> Leaving:
        n, free = len(seen.x), seen.free
        first = [math.sqrt(n) if class_start and t == 0 and seen.prefix else 1.0 for t in range(n)]
        gaps, gone = [], []
        if similar:
            coarse = joined(votes(seen.plain, list(range(n)), first, 1), filtered)
            order = by({t: coarse[t] for t in free})
            half = (len(order) + 1) // 2
            gaps.append((coarse[order[half - 1]] - coarse[order[half]]) * n)
            cos = cosines(seen.keys.mean(0))
            near = {a: nearest(cos, a, order[:half])[1] for a in order[half:]}
            alike = by(near)
            gone = alike[:similar]
            gaps += [near[alike[similar - 1]] - near[alike[similar]]] if similar < len(alike) else []
        alive = [t for t in range(n) if t not in gone]
        fine = joined(votes(seen.plain, alive, first, rounds), filtered)
        order = by({t: fine[t] for t in free if t in alive})
        stay = len(order) - (leave - len(gone))
        if stay < len(order):
            gaps.append((fine[order[stay - 1]] - fine[order[stay]]) * n)
        kept = sorted([*range(seen.prefix), *order[:stay]])
        return Leaving(kept, dropped=[t for t in range(n) if t not in kept], gaps=gaps)

    return rule
