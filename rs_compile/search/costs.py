"""From a shape to counts that cost what is asked: predicted from the graphs seen before, then counted on a new one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rs_compile.search.shapes import Counts

Rows = Sequence[tuple[int, int, int]]  # of each block: tokens in, tokens out, multiply-accumulates
_SLACK = 0.004  # of the dense model: so far below the target is near enough
_TRIES = 3
_OPTIONS = 32  # scales tried of what has few counts
_PRIOR = 0.02  # how much what was assumed counts beside what was seen
_ASSUMED = (0.22, 0.07, 0.58, 0.13)  # of a block: queries, keys and values; projection; MLP; attention


@dataclass(frozen=True)
class Counted:
    """What a rewritten graph costs: multiply-accumulates of one sample, in all and by block."""

    macs: int
    rows: Rows


# what of a block is computed on how many tokens: (queries, keys and values), projection, MLP, and the product of
# queries and keys; "in" and "out" are the tokens that come in and go out
PLACES: dict[str, tuple[str, str, str, str]] = {
    "after the block": ("in", "in", "in", "in"),
    "before the MLP": ("in", "in", "out", "in"),
    "before attention": ("in", "out", "out", "out"),
}
Place = Callable[[int], str]  # of a block, one of PLACES


@dataclass
class CostModel:
    """Multiply-accumulates by counts: what four parts of a block cost is learned from the graphs seen.

    The last block, where unread tokens are dropped, goes by the tokens that come in.

    Args:
        dense: of the dense model.
    """

    dense: Counted
    _seen: list[tuple[tuple[float, ...], float]] = field(default_factory=list)
    _last: float = 1.0
    _rest: float | None = None

    def predict(self, counts: Counts, place: Place) -> float:
        """Of the whole model, where these leave."""
        parts, total = self._parts(), self._outside()
        gone = 0
        for i, (tokens, _, macs) in enumerate(self.dense.rows):
            x = (tokens - gone) / tokens
            gone += counts.get(i, 0)
            y = (tokens - gone) / tokens
            share = self._last * x if i == len(self.dense.rows) - 1 else float(np.dot(parts, _on(place(i), x, y)))
            total += macs * share
        return total

    def learn(self, found: Counted, place: Place) -> None:
        """Takes a rewritten graph's costs in."""
        pairs = list(zip(self.dense.rows, found.rows, strict=True))
        for i, ((tokens, _, dense), (into, out, macs)) in enumerate(pairs[:-1]):
            self._seen.append((_on(place(i), into / tokens, out / tokens), macs / dense))
        (tokens, _, dense), (into, _, macs) = pairs[-1]
        self._last = macs / dense * tokens / into
        self._rest = found.macs - sum(macs for _, _, macs in found.rows)

    def _outside(self) -> float:
        return self.dense.macs - sum(m for _, _, m in self.dense.rows) if self._rest is None else self._rest

    def _parts(self) -> np.ndarray:
        features = [f for f, _ in self._seen] + list(np.eye(4) * _PRIOR)
        shares = [s for _, s in self._seen] + list(_PRIOR * np.array(_ASSUMED))
        found: np.ndarray = np.linalg.lstsq(np.array(features), np.array(shares), rcond=None)[0]
        return found


def _on(place: str, x: float, y: float) -> tuple[float, float, float, float]:
    read, project, mlp, mixed = ({"in": x, "out": y}[at] for at in PLACES[place])
    return read, project, mlp, mixed**2


def fitting(
    of: Callable[[float], Counts], model: CostModel, place: Place, target: float
) -> Iterator[tuple[Counts, Callable[[Counted], None]]]:
    """Counts to be counted, each with what to call with the result, until one costs little less than the target.

    Args:
        of: counts by scale, from 0 to 1.
        model: learns on the way.
        place: where in a block tokens leave.
        target: multiply-accumulates, not to be exceeded.
    """
    aim, seen = target, list[Counts]()
    for _ in range(_TRIES):
        counts = _largest(of, model, place, aim)
        if counts in seen or not counts:
            return
        seen.append(counts)
        found: list[Counted] = []
        yield counts, found.append
        if not found:
            return
        model.learn(found[0], place)
        over = found[0].macs - target
        if -max(_SLACK, 1 / model.dense.rows[0][0]) * model.dense.macs <= over <= 0:  # or a token of the first block
            return
        # what the model cannot know is taken off; a little more, so that the next one is below
        aim = target - (found[0].macs - model.predict(counts, place)) - max(0.0, 0.1 * over)


def _largest(of: Callable[[float], Counts], model: CostModel, place: Place, aim: float) -> Counts:
    """The fewest tokens that leave at a predicted cost of at most `aim`; the most that can, where none do."""
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        if model.predict(of(middle), place) > aim:
            low = middle
        else:
            high = middle
    # where dropping what is unread is cheap enough already, as few as can
    return of(high) or next((counts for step in range(1, 101) if (counts := of(step / 100))), {})


def bisecting(of: Callable[[float], Counts], target: float) -> Iterator[tuple[Counts, Callable[[Counted], None]]]:
    """As `fitting` where few counts are possible: halves the list of them by what each costs."""
    options: list[Counts] = []
    for step in range(1, _OPTIONS + 1):
        if (counts := of(step / _OPTIONS)) and counts not in options:
            options.append(counts)
    low, high = 0, len(options)
    while low < high:
        middle = (low + high) // 2
        found: list[Counted] = []
        yield options[middle], found.append
        if found and found[0].macs <= target:
            high = middle
        else:  # also where it is refused: one of the others may not be
            low = middle + 1
