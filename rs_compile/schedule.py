"""What leaves the model where: tokens pruned or merged after blocks, rows and columns after a CNN's stages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

from passes.graph.base import ScheduleError
from passes.graph.codes import Code
from passes.sites.choice import check_choice
from passes.sites.grid_prune import GridPrune
from passes.sites.importance import Lowest, Random, Score, Shift
from passes.sites.mergers import Merger, Stream
from passes.sites.per_block import PerBlock
from passes.sites.retarget import Gap
from rs_compile.schedule_json import by_index, item, read, written

Rounding = Literal["removed", "kept"]

_EXAMPLE = '"0:0.8,3:0.8,6:0.8"'


@dataclass(frozen=True)
class Schedule:
    """What leaves the model where; hashable, so that it can key a cache.

    After the complete block `i` of `keep`, `removed(n, keep[i])` of the n current tokens leave, prefix
    tokens counted in n but never removed. DeiT with `{0: 0.8, 3: 0.8, 6: 0.8}`: 197 -> 158 -> 127 -> 102.

    Args:
        keep: block index (0-based, in order of the MLP branches) -> keep ratio in (0, 1].
        score: by which the tokens that stay are chosen: `Shift`, the representation shift, or a baseline (`Random`,
            `ClassAttention`, ...); of rows and columns too, by `Shift`'s metric. Lowest(score) keeps the lowest.
        protected: indices of the tokens that never leave; None lets the compiler find the class,
            register and distillation tokens. Stored sorted, each once.
        merge: block index -> how many tokens merge away there: a count r, or a share of the tokens below 1.
        by: which tokens merge, where, and what becomes of them: `Stream`, `ToMe`, `PiToMe`,
            `VidTLDR`, `DiffRate` or `Ward`.
        grid: stage index (0-based) -> `GridPrune`, for CNNs; goes with neither keep nor merge.
        gap: what a scan (a state-space model) does where tokens were pruned. "compact" scans the kept tokens as one
            sequence. "decay": where k tokens are gone between a kept token and the kept one that the scan comes
            from, in either direction, the state decays k + 1 times with the kept token's own step,
            exp((k + 1) delta_t A), and takes up its input once. Convolutions read the kept neighbours in both.
        rounding: which count is rounded down: of n tokens int((1 - keep) n) are "removed" (DeiT's published
            schedules), or int(keep n), and at least one, are "kept" (Vision Mamba's: 197 -> 157 -> 125).
        multiple_of: the count of what stays, prefix tokens among it, is rounded up to a multiple of this, as far as
            there are tokens; with 16, DeiT goes 197 -> 160 -> 128 -> 112. A CPU with matrix units (AMX,
            bfloat16) was seen to attend to 160 tokens in a third of the time that 158 took.

    Raises:
        ScheduleError: a value out of its range, with what to write instead.
    """

    keep: Mapping[int, float] = PerBlock()
    score: Score = Shift()
    protected: tuple[int, ...] | None = None
    merge: Mapping[int, int | float] = PerBlock()
    by: Merger = Stream()
    grid: Mapping[int, GridPrune] = PerBlock()
    gap: Gap = "compact"
    rounding: Rounding = "removed"
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.keep, Mapping):
            raise ScheduleError(
                f"keep is {self.keep!r}, not a mapping of block index to keep ratio; "
                "write keep={0: 0.8, 3: 0.8}, or Schedule.uniform(depth, keep_ratio) for one ratio everywhere"
            )
        pairs = [(_block(block), _ratio(ratio, block)) for block, ratio in self.keep.items()]
        object.__setattr__(self, "keep", PerBlock(pairs))
        for name, of in (("merge", "how many tokens merge"), ("grid", "GridPrune")):
            if not isinstance(value := getattr(self, name), Mapping):
                raise ScheduleError(f"{name} is {value!r}, not a mapping of index to {of}")
        merges = [(_block(block, "merge"), _merged(r, block)) for block, r in self.merge.items()]
        object.__setattr__(self, "merge", PerBlock(merges))
        object.__setattr__(self, "grid", PerBlock((_block(i, "grid"), _grid(g, i)) for i, g in self.grid.items()))
        self._check_values()
        self._check_together()
        check_choice("gap", self.gap, get_args(Gap))
        check_choice("rounding", self.rounding, get_args(Rounding))
        if not _is_int(self.multiple_of) or self.multiple_of < 1:
            raise ScheduleError(f"multiple_of is {self.multiple_of!r}; write an integer of at least 1, like 16")
        object.__setattr__(self, "multiple_of", int(self.multiple_of))
        if self.protected is not None:
            object.__setattr__(self, "protected", _protected(self.protected))

    def _check_values(self) -> None:
        if not isinstance(self.score, Score):
            raise ScheduleError(f"score is {self.score!r}; write Shift(), Random() or another score of rs_compile")
        if not isinstance(self.by, Merger):
            raise ScheduleError(f"by is {self.by!r}; write Stream(), ToMe(), PiToMe(), VidTLDR(), DiffRate() or Ward()")

    def _check_together(self) -> None:
        prunes = bool(self.keep or self.grid)
        unread = {
            "by": self.by != Stream() and not self.merge,
            "score": self.score != Shift() and not prunes and bool(self.merge),
            "rounding": self.rounding != "removed" and not self.keep,
        }
        if name := next((name for name, is_unread in unread.items() if is_unread), ""):
            needs = {"by": "merge", "score": "keep or grid", "rounding": "keep"}[name]
            raise ScheduleError(
                f"{name} is {getattr(self, name)!r}, and nothing reads it without {needs}; remove it",
                code=Code.UNREAD_OPTION,
            )
        if self.grid:
            self._check_grid()
        if self.grid and (self.keep or self.merge):
            raise ScheduleError(
                "grid prunes a CNN's stages, keep and merge a transformer's blocks; write one of the two",
                code=Code.UNREAD_OPTION,
            )
        if self.gap == "decay" and self.score.centres:
            raise ScheduleError(
                f"gap is 'decay', and {self.score!r} moves the class token, so that its gaps are no gaps; "
                "write gap='compact' or TopViM()"
            )
        if alone := sorted(self.by.drops.keys() - self.merge.keys()):
            raise ScheduleError(
                f"{type(self.by).__name__} drops tokens in block {alone[0]}, and merge says nothing leaves there; "
                "merge counts what is dropped and what merges together, so name the block in it"
            )
        if both := sorted(i for i, r in self.merge.items() if r and self.keep.get(i, 1) < 1):
            raise ScheduleError(
                f"block {both[0]} both prunes and merges; leave it in one of keep and merge", code=Code.UNREAD_OPTION
            )

    def _check_grid(self) -> None:
        by = self.score.score if isinstance(self.score, Lowest) else self.score
        if not isinstance(by, Random) and by != Shift(metric=by.metric if isinstance(by, Shift) else "l2"):
            raise ScheduleError(
                f"score is {self.score!r}, and a stage has no tokens or attention to score; "
                "write Shift(metric=...), Random() or Lowest of them, and GridPrune(against=...)",
                code=Code.UNREAD_OPTION,
            )
        if self.protected is not None:
            raise ScheduleError(
                "protected names tokens, and a stage has rows and columns; leave it out", code=Code.UNREAD_OPTION
            )

    @property
    def prunes(self) -> bool:
        """Whether any token, row or column leaves."""
        return (
            any(ratio < 1 for ratio in self.keep.values())
            or any(self.merge.values())
            or any(g.rows or g.columns for g in self.grid.values())
        )

    def left(self, n: int, keep_ratio: float) -> int:
        """How many of `n` tokens stay at `keep_ratio`, in exact arithmetic; see `rounding` and `multiple_of`."""
        if self.rounding == "removed":
            return self._rounded(n - removed(n, keep_ratio), n)
        return self._rounded(max(1, int(_exact(keep_ratio) * n)), n)

    def merged(self, n: int, r: int | float) -> int:
        """How many of `n` tokens merge away: r where it is a count, else int(n * r) exactly; see `multiple_of`."""
        gone = r if isinstance(r, int) else int(n * _exact(r))
        return max(0, gone - (gone - n) % self.multiple_of)

    def _rounded(self, left: int, n: int) -> int:
        return min(n, left + -left % self.multiple_of)

    @classmethod
    def uniform(cls, depth: int, keep_ratio: float, every: int = 1, start: int = 0) -> Schedule:
        """The same keep ratio after blocks start, start + every, ... of a model `depth` blocks deep."""
        for name, value, least in (("depth", depth, 1), ("every", every, 1), ("start", start, 0)):
            if not _is_int(value) or value < least:
                raise ScheduleError(f"{name} is {value!r}; write an integer of at least {least}")
        if start >= depth:
            raise ScheduleError(
                f"start is {start}, past the last of {depth} blocks; write a start from 0 to {depth - 1}",
                code=Code.NO_SUCH_PART,
            )
        return cls(dict.fromkeys(range(start, depth, every), keep_ratio))

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Reads `block:ratio` pairs, separated by commas: "0:0.8,3:0.8,6:0.8"."""
        if not text.strip():
            raise ScheduleError(f"the schedule is empty; write block:ratio pairs, {_EXAMPLE}, or 0:1 to prune nothing")
        pairs = []
        for part in text.split(","):
            block, colon, ratio = (piece.strip() for piece in part.partition(":"))
            if not (colon and block and ratio):
                raise ScheduleError(f"{part.strip()!r} is not block:ratio; write pairs like {_EXAMPLE}")
            try:
                pairs.append((block, float(ratio)))
            except ValueError:
                raise ScheduleError(
                    f"the keep ratio of block {block} is {ratio!r}; write a number above 0 and at most 1"
                ) from None
        return cls(by_index(pairs))

    @classmethod
    def of(cls, schedule: Schedule | Mapping[int, float] | str | os.PathLike[str]) -> Schedule:
        """The schedule itself, or the one that stands for: `{block: ratio}`, a .json file, its content, or pairs.

        Raises:
            ScheduleError: it stands for none, or there is no such file.
        """
        if isinstance(schedule, cls):
            return schedule
        if isinstance(schedule, Mapping):
            return cls(schedule)
        if isinstance(schedule, str) and schedule.lstrip().startswith("{"):
            return cls.from_json(schedule)
        if isinstance(schedule, os.PathLike) or (isinstance(schedule, str) and schedule.endswith(".json")):
            try:
                return cls.from_json(Path(schedule).read_text())
            except (OSError, UnicodeDecodeError) as error:
                raise ScheduleError(f"no schedule can be read from {os.fspath(schedule)}: {error}") from None
        if isinstance(schedule, str):
            return cls.parse(schedule)
        raise ScheduleError(
            f"{schedule!r} is no schedule; pass a Schedule, a dict like {{0: 0.8, 3: 0.8}}, "
            f'pairs like {_EXAMPLE}, or a file, "schedule.json"'
        )

    def to_json(self) -> str:
        """One line of JSON; `Schedule.from_json` gives an equal schedule back."""
        return written({field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Reads what `to_json` writes; an unknown or a repeated key is refused by its name."""
        return cls(**read(text, [field.name for field in fields(cls)]))


def removed(n: int, keep_ratio: float) -> int:
    """How many of `n` tokens leave at `keep_ratio`: int((1 - keep_ratio) * n), in exact arithmetic.

    The ratio counts as the decimal or the fraction that the user wrote: 0.8 of 10 removes 2, where floats say 1, and
    8 / 11 of 11 removes 3.

    Raises:
        ScheduleError: n is negative or not an integer, or keep_ratio is not in (0, 1].
    """
    if not _is_int(n) or n < 0:
        raise ScheduleError(f"the token count is {n!r}; pass an integer of at least 0")
    return int((1 - _exact(_ratio(keep_ratio))) * n)


def _exact(share: float) -> Fraction:
    """A float has digits enough for any fraction with such a denominator; 0 is not meant by a share above it."""
    return Fraction(str(share)).limit_denominator(10**9) or Fraction(str(share))


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _block(value: Any, table: str = "keep") -> int:
    if not _is_int(value) or value < 0:
        raise ScheduleError(f"{item(table)} index {value!r} in {table}; write an integer of at least 0, counted from 0")
    return int(value)


def _ratio(value: Any, block: Any = None) -> float:
    of = "" if block is None else f" of block {block}"
    fault = ScheduleError(
        f"the keep ratio{of} is {value!r}; write a number above 0 and at most 1, like 0.8 to keep 80%"
    )
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not (real and 0 < value <= 1):  # before float(), which overflows on a huge integer
        raise fault
    # a NumPy float32 prints as the decimal that was written; float() would show its binary error
    ratio = float(value) if isinstance(value, int | float | Fraction) else float(str(value))
    if ratio == 0:  # a fraction below the smallest float
        raise fault
    return ratio


def _merged(value: Any, block: Any) -> int | float:
    """A count of at least 0, or a share below 1."""
    if _is_int(value) and value >= 0:
        return int(value)
    real = isinstance(value, Real) and not isinstance(value, bool | Integral)
    if not (real and 0 <= value < 1):
        raise ScheduleError(
            f"merge of block {block} is {value!r}; write how many tokens merge away, like 13, "
            "or a share below 1, like 0.2"
        )
    return float(value) if isinstance(value, float | Fraction) else float(str(value))


def _grid(value: Any, stage: Any) -> GridPrune:
    if not isinstance(value, GridPrune):
        raise ScheduleError(f"grid of stage {stage} is {value!r}; write GridPrune(rows=8, columns=8)")
    return value


def _protected(value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ScheduleError(f"protected is {value!r}; write token indices like (0, 1), or None to find them")
    tokens = tuple(value)
    for token in tokens:
        if not _is_int(token) or token < 0:
            raise ScheduleError(f"protected token {token!r}; write an integer of at least 0, its place in the sequence")
    return tuple(sorted({int(token) for token in tokens}))
