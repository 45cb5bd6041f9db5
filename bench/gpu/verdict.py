"""Which of two ways is faster, from rounds in which both ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from rs_compile.timing import Spread

MARGIN = 0.02  # a ratio this near to 1 decides nothing


def winner(a: str, b: str, ratio: Mapping[str, float]) -> str:
    """The faster of two ways, "" where both quartiles and the margin do not agree on one.

    Args:
        a, b: their names.
        ratio: seconds of a over seconds of b, with quartiles, as `Spread.to_dict` has it.
    """
    if ratio["quartile_low"] > 1 + MARGIN:
        return b
    if ratio["quartile_high"] < 1 / (1 + MARGIN):
        return a
    return ""


def in_words(a: str, b: str, ratio: Mapping[str, float]) -> str:
    """`winner` as text: how much faster it is."""
    spread = Spread(ratio["median"], ratio["quartile_low"], ratio["quartile_high"])
    better = winner(a, b, ratio)
    if not better:
        return f"no difference ({b} over {a}: {spread})"
    if better == a:
        spread = Spread(1 / spread.median, 1 / spread.high, 1 / spread.low)
    return f"{better} is faster, {spread}"


def by_size(a: str, b: str, better: Sequence[tuple[int, str]], what: str) -> str:
    """One sentence for a row of sizes, smallest first: where one way wins, and where the other.

    Args:
        better: the size and its winner, "" for neither.
        what: sizes are of, "tokens".
    """
    decided = [(size, name) for size, name in sorted(better) if name]
    if not decided:
        return f"neither is faster at any number of {what} measured"
    first, last = decided[0][1], decided[-1][1]
    if first == last and all(name == first for _, name in decided):
        return f"{first} is faster wherever there is a difference ({what}: {', '.join(str(s) for s, _ in decided)})"
    turns = sum(x[1] != y[1] for x, y in pairwise(decided))
    if turns == 1:
        below = max(size for size, name in decided if name == first)
        above = min(size for size, name in decided if name == last)
        return f"{first} is faster up to {below} {what}, {last} from {above} on"
    return "no clear border: " + ", ".join(f"{name} at {size}" for size, name in decided)
