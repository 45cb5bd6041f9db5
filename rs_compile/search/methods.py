"""The ways to leave tokens out that a search chooses among, and the shapes that it starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from passes.sites.attention_scores import ClassAttention, ZeroTPrune
from passes.sites.grid_prune import GridPrune, Mode
from passes.sites.importance import Random, Score, Shift, TopViM
from passes.sites.mergers import DiffRate, PiToMe, Stream, ToMe, Ward
from rs_compile.schedule import Schedule
from rs_compile.search.shapes import DIFFRATE, Counts, GridRamp, Profile, Ramp, Ratio, Shape

Make = Callable[[Counts, Mapping[int, float]], Schedule]  # counts, and the keep ratios that they are
RANDOM = "prune: random"


@dataclass(frozen=True)
class Method:
    """One way to leave tokens out.

    Args:
        name: for tables.
        make: the schedule for these counts.
        merges: at most half of the tokens leave in one block.
        first: the first block of the shapes that it starts from.
        spare: so many blocks at the end have no site: where what leaves would be read by nothing behind.
        draws: runs over which drift is averaged, where chance decides.
        grid: rows and columns of a CNN's stages leave, not tokens of blocks.
        published: further shapes to start from.
        places: where in a block tokens leave, of `PLACES`: in the first half of the blocks in use, and the others.
    """

    name: str
    make: Make
    merges: bool = False
    first: int = 1
    spare: int = 1
    draws: int = 1
    grid: bool = False
    published: tuple[str, ...] = ()
    places: tuple[str, str] = ("after the block", "after the block")

    def place(self, counts: Counts, block: int) -> str:
        """Where in this block tokens leave."""
        return self.places[block not in _first_half(counts)]

    def starts(self, depth: int, able: Sequence[int]) -> list[Shape]:
        """The shapes to start from, published ones last.

        Args:
            depth: blocks, or stages.
            able: those that tokens may leave in, ascending.
        """
        first = next((b for b in able if b >= self.first), able[-1])
        if self.grid:
            return [GridRamp(first, 0.0), GridRamp(first, 1.0)]
        return [Ramp(first, 0.0), Ramp(first, 0.5), *self.given(depth, able)]

    def given(self, depth: int, able: Sequence[int]) -> list[Shape]:
        """The published shapes, for as many blocks."""
        shapes: dict[str, Shape] = {
            "paper": Ratio(tuple(dict.fromkeys(min(round(b * depth / 12), able[-1]) for b in (0, 3, 6)))),
            "uniform": Ramp(able[0], 0.0),
            "falling": Ramp(able[0], 1.0),
            "diffrate": Profile("DiffRate's profile", DIFFRATE),
        }
        return [shapes[name] for name in self.published]


def _first_half(counts: Counts) -> set[int]:
    return set(sorted(counts)[: (len(counts) + 1) // 2])


def _prune_then_ward(counts: Counts, keep: Mapping[int, float]) -> Schedule:
    early = _first_half(counts)
    late = {i: count for i, count in counts.items() if i not in early}
    return Schedule({i: keep[i] for i in early}, merge=late, by=Ward()) if late else Schedule(keep)


def diffrate(counts: Mapping[int, int]) -> Schedule:
    """Three of eight tokens that leave are pruned, the others merge: about as in most of the published counts."""
    return Schedule(merge=counts, by=DiffRate(pruned={i: 3 * c // 8 for i, c in counts.items()}))


_INPUTS = ("before attention", "before attention")
_BETWEEN = ("before the MLP", "before the MLP")
TOKENS: tuple[Method, ...] = (
    Method("Ward", lambda counts, _: Schedule(merge=counts, by=Ward()), True, spare=0, places=_INPUTS),
    Method(
        "ToMe",
        lambda counts, _: Schedule(merge=counts, by=ToMe()),
        True,
        published=("uniform", "falling"),
        places=_BETWEEN,
    ),
    Method("stream", lambda counts, _: Schedule(merge=counts, by=Stream()), True, published=("uniform",)),
    Method(
        "prune by shift, then Ward",
        _prune_then_ward,
        True,
        first=0,
        spare=0,
        published=("diffrate",),
        places=("after the block", "before attention"),
    ),
    Method("prune: shift", lambda _, keep: Schedule(keep), first=0, published=("paper",)),
    Method("PiToMe", lambda counts, _: Schedule(merge=counts, by=PiToMe()), True, places=_BETWEEN),
    Method("DiffRate", lambda counts, _: diffrate(counts), published=("diffrate",), places=_BETWEEN),
    Method("prune: Zero-TPrune", lambda _, keep: Schedule(keep, score=ZeroTPrune()), published=("paper",)),
    Method("prune: class attention", lambda _, keep: Schedule(keep, score=ClassAttention()), published=("paper",)),
    Method(RANDOM, lambda _, keep: Schedule(keep, score=Random()), first=0, draws=3, published=("paper",)),
)
# models without attention have these and what of the others they allow
SCANS: tuple[Method, ...] = (
    Method("prune: shift", lambda _, keep: Schedule(keep), first=0, published=("paper",)),
    Method("prune: shift, decay over gaps", lambda _, keep: Schedule(keep, gap="decay"), first=0, published=("paper",)),
    Method("prune: ToP-ViM", lambda _, keep: Schedule(keep, score=TopViM()), first=0, published=("paper",)),
    Method("stream", lambda counts, _: Schedule(merge=counts, by=Stream()), True),
    Method(RANDOM, lambda _, keep: Schedule(keep, score=Random()), first=0, draws=3, published=("paper",)),
)


def _grid(counts: Counts, mode: Mode, score: Score = Shift()) -> Schedule:
    return Schedule(grid={i: GridPrune(c, c, mode=mode) for i, c in counts.items()}, score=score)


GRIDS: tuple[Method, ...] = (
    Method("rows and columns: shift", lambda counts, _: _grid(counts, "line"), first=0, grid=True),
    Method("tokens by line: shift", lambda counts, _: _grid(counts, "token"), first=0, grid=True),
    Method(RANDOM, lambda counts, _: _grid(counts, "line", score=Random()), first=0, draws=3, grid=True),
)


def keep_ratios(counts: Counts, tokens: Sequence[int]) -> dict[int, float]:
    """Keep ratios that leave out exactly these counts, of the tokens that are then there."""
    gone, keep = 0, {}
    for block, count in sorted(counts.items()):
        left = tokens[block] - gone
        keep[block] = round((left - count - 0.5) / left, 9)  # int() takes the half token off again
        gone += count
    return keep
