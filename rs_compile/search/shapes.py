"""How the tokens that leave are spread over the blocks: few parameters, so that few pictures can choose among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Protocol

Counts = dict[int, int]  # block -> how many tokens leave there
# tokens that reach each block of DeiT-S at 2.9 GFLOPs (Chen et al., DiffRate, ICCV 2023)
DIFFRATE = (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3)
_STEP = 0.5
_STEEPEST = 2.0


class Shape(Protocol):
    """Counts for every scale from 0 to 1; more tokens leave at a higher one."""

    @property
    def name(self) -> str: ...

    def counts(self, scale: float, tokens: Sequence[int], able: Sequence[int], halves: bool) -> Counts:
        """How many leave after which block.

        Args:
            scale: above 0, at most 1.
            tokens: that reach each block of the dense model.
            able: the blocks that tokens may leave in, ascending.
            halves: at most half of the tokens leave in one block (merging).
        """

    def neighbours(self, able: Sequence[int]) -> Sequence[Shape]:
        """One step away in one parameter."""


@dataclass(frozen=True)
class Ramp:
    """From block `first` to the last one, changing linearly: 1 + slope at the start, 1 - slope at the end, at least 0.

    Slope 0 is ToMe's uniform r; 1 falls to none.
    """

    first: int
    slope: float

    @property
    def name(self) -> str:
        way = "falling" if self.slope > 0 else "rising"
        kind = f"{way} by {abs(self.slope):g}" if self.slope else "uniform"
        return f"{kind} from {self.first}"

    def counts(self, scale: float, tokens: Sequence[int], able: Sequence[int], halves: bool) -> Counts:
        blocks = [b for b in able if b >= self.first]
        if not blocks:
            return {}
        steps = max(1, len(blocks) - 1)
        weights = [max(0.0, 1 + self.slope * (1 - 2 * i / steps)) for i in range(len(blocks))]
        # so that the cap of what can leave in one block is met at scale 1
        sums = [round(scale * tokens[blocks[0]] * s) for s in accumulate(weights)]
        counts = (after - before for before, after in pairwise([0, *sums]))
        return _capped(dict(zip(blocks, counts, strict=True)), tokens, halves)

    def neighbours(self, able: Sequence[int]) -> Sequence[Shape]:
        slopes = [s for s in (self.slope + _STEP, self.slope - _STEP) if -1 <= s <= _STEEPEST]
        return [replace(self, slope=s) for s in slopes] + [replace(self, first=f) for f in _beside(self.first, able)]


@dataclass(frozen=True)
class Ratio:
    """The same share after each of a few blocks, as the paper's 20% after 0, 3 and 6."""

    blocks: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"the same share after {', '.join(map(str, self.blocks))}"

    def counts(self, scale: float, tokens: Sequence[int], able: Sequence[int], halves: bool) -> Counts:
        blocks = [b for b in self.blocks if b in able]
        left, counts = tokens[blocks[0]] if blocks else 0, {}
        for block in blocks:
            counts[block] = int(scale * left)
            left -= counts[block]
        return _capped(counts, tokens, halves)

    def neighbours(self, able: Sequence[int]) -> Sequence[Shape]:
        moved = [tuple(b + by for b in self.blocks) for by in (1, -1)]
        return [Ratio(blocks) for blocks in moved if set(blocks) <= set(able)]


@dataclass(frozen=True)
class Profile:
    """Published token counts, their shares of all tokens raised to a power."""

    title: str
    kept: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.title

    def counts(self, scale: float, tokens: Sequence[int], able: Sequence[int], halves: bool) -> Counts:
        shares = [(k / self.kept[0]) ** (4 * scale) for k in self.kept]
        at = [i * (len(shares) - 1) / max(1, len(tokens) - 1) for i in range(len(tokens))]
        fine = [shares[int(a)] + (a % 1) * (shares[min(int(a) + 1, len(shares) - 1)] - shares[int(a)]) for a in at]
        whole = [round(tokens[able[0]] * s) for s in fine]
        return _capped({i: whole[i] - whole[i + 1] for i in able if i + 1 < len(whole)}, tokens, halves)

    def neighbours(self, able: Sequence[int]) -> Sequence[Shape]:
        return []


@dataclass(frozen=True)
class GridRamp:
    """As `Ramp` for the rows of a CNN's stages: the share of its rows that a stage loses, as many columns with them.

    What is left is a multiple of what the strides behind divide it by, each taken as 2.
    """

    first: int
    slope: float

    @property
    def name(self) -> str:
        return Ramp(self.first, self.slope).name

    def counts(self, scale: float, tokens: Sequence[int], able: Sequence[int], halves: bool) -> Counts:
        share, counts = 1.0, {}
        stages = [i for i in able if i >= self.first]
        for step, i in enumerate(stages):
            rows = round(tokens[i] * share)
            weight = max(0.0, 1 + self.slope * (1 - 2 * step / max(1, len(stages) - 1)))
            multiple = 2 ** (len(tokens) - 1 - i)
            gone = int(min(scale * weight, 1.0) * rows / multiple) * multiple
            if (gone := min(gone, rows - multiple)) > 0:
                counts[i] = gone
                share *= (rows - gone) / rows
        return counts

    def neighbours(self, able: Sequence[int]) -> Sequence[Shape]:
        slopes = [s for s in (self.slope + _STEP, self.slope - _STEP) if -1 <= s <= _STEEPEST]
        return [replace(self, slope=s) for s in slopes] + [replace(self, first=f) for f in _beside(self.first, able)]


def _beside(first: int, able: Sequence[int]) -> list[int]:
    """The blocks next to it that tokens may leave in, but for the last one."""
    later = [b for b in able if b > first][:1]
    return [b for b in later if b != able[-1]] + [b for b in able if b < first][-1:]


_FEWEST = 8  # tokens left, so that class and register tokens are among them


def _capped(counts: Counts, tokens: Sequence[int], halves: bool) -> Counts:
    """At most what can leave: of n tokens half but a few where they merge, and a few stay in any case."""
    gone, capped = 0, {}
    for block, count in sorted(counts.items()):
        left = tokens[block] - gone
        most = min(left // 2 - 4 if halves else left, left - _FEWEST)
        if (count := min(count, most)) > 0:
            capped[block] = count
            gone += count
    return capped
