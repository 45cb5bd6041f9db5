"""What to prune: after which blocks, how many tokens, and by which score."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, Literal, get_args

from rs_compile.errors import ScheduleError

Operation = Literal["mlp", "attention", "block"]
Metric = Literal["l2", "l1", "cosine"]
Importance = Literal["shift", "class-attention", "mean-attention", "random"]

_BLOCK_TEXT = re.compile(r"0|[1-9][0-9]*")
_EXAMPLE = '"0:0.8,3:0.8,6:0.8"'


class KeepRatios(Mapping[int, float]):
    """An immutable, hashable, picklable mapping of block index to keep ratio, in block order."""

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Iterable[tuple[int, float]]) -> None:
        self._pairs = tuple(sorted(pairs))

    def __getitem__(self, block: int) -> float:
        return dict(self._pairs)[block]

    def __iter__(self) -> Iterator[int]:
        return (block for block, _ in self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __hash__(self) -> int:
        return hash(self._pairs)

    def __repr__(self) -> str:
        return repr(dict(self._pairs))


@dataclass(frozen=True)
class Schedule:
    """Which tokens leave the model where; hashable, so that it can key a cache.

    After the complete block `i` of `keep`, `removed(n, keep[i])` of the n current tokens leave, prefix
    tokens counted in n but never removed. DeiT with `{0: 0.8, 3: 0.8, 6: 0.8}`: 197 -> 158 -> 127 -> 102.

    Args:
        keep: block index (0-based, in order of the MLP branches) -> keep ratio in (0, 1].
        operation: the layer F of the representation shift s = D(F(x), x) (paper, section 3): "mlp" and
            "attention" compare that branch's output with the stream it is added to, "block" the
            block's output with its input, skips included.
        metric: D, the distance over the channels: "l2" unsquared, "l1", or "cosine", 1 - cos.
        with_skip: compare x + F(x), not F(x), with x; a block's shift has its skips in any case.
        protected: indices of the tokens that never leave; None lets the compiler find the class,
            register and distillation tokens. Stored sorted, each once.
        importance: "shift", or a baseline: "class-attention" (Eq. 2), "mean-attention" (Eq. 3), "random".
            The baselines do not read operation, metric and with_skip.
        lowest: keep the tokens of lowest score; a baseline that shows what the score is worth.

    Raises:
        ScheduleError: a value out of its range, with what to write instead.
    """

    keep: Mapping[int, float]
    operation: Operation = "mlp"
    metric: Metric = "l2"
    with_skip: bool = False
    protected: tuple[int, ...] | None = None
    importance: Importance = "shift"
    lowest: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.keep, Mapping):
            raise ScheduleError(
                f"keep is {self.keep!r}, not a mapping of block index to keep ratio; "
                "write keep={0: 0.8, 3: 0.8}, or Schedule.uniform(depth, keep_ratio) for one ratio everywhere"
            )
        pairs = [(_block(block), _ratio(ratio, block)) for block, ratio in self.keep.items()]
        object.__setattr__(self, "keep", KeepRatios(pairs))
        _choice("operation", self.operation, get_args(Operation))
        _choice("metric", self.metric, get_args(Metric))
        _choice("importance", self.importance, get_args(Importance))
        for flag in ("with_skip", "lowest"):
            if not isinstance(value := getattr(self, flag), bool):
                raise ScheduleError(f"{flag} is {value!r}; write True or False")
        if self.protected is not None:
            object.__setattr__(self, "protected", _protected(self.protected))

    @property
    def prunes(self) -> bool:
        """Whether any token leaves: some keep ratio is below 1."""
        return any(ratio < 1 for ratio in self.keep.values())

    @classmethod
    def uniform(cls, depth: int, keep_ratio: float, every: int = 1, start: int = 0) -> Schedule:
        """The same keep ratio after blocks start, start + every, ... of a model `depth` blocks deep."""
        for name, value, least in (("depth", depth, 1), ("every", every, 1), ("start", start, 0)):
            if not _is_int(value) or value < least:
                raise ScheduleError(f"{name} is {value!r}; write an integer of at least {least}")
        if start >= depth:
            raise ScheduleError(
                f"start is {start}, past the last of {depth} blocks; write a start from 0 to {depth - 1}"
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
        return cls(_blocks_of(pairs))

    @classmethod
    def of(cls, schedule: Schedule | Mapping[int, float]) -> Schedule:
        """The schedule itself, or the one that a plain `{block: ratio}` stands for."""
        if isinstance(schedule, cls):
            return schedule
        if isinstance(schedule, Mapping):
            return cls(schedule)
        raise ScheduleError(
            f"{schedule!r} is no schedule; pass a Schedule, a dict like {{0: 0.8, 3: 0.8}}, "
            f"or Schedule.parse({_EXAMPLE})"
        )

    def to_json(self) -> str:
        """One line of JSON; `Schedule.from_json` gives an equal schedule back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps(values | {"keep": {str(block): ratio for block, ratio in self.keep.items()}})

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Reads what `to_json` writes; an unknown or a repeated key is refused by its name."""
        try:
            values = json.loads(text, object_pairs_hook=_no_repeats)
        except json.JSONDecodeError as error:
            raise ScheduleError(
                f'the schedule is no JSON ({error}); write an object like {{"keep": {{"0": 0.8}}}}'
            ) from None
        if not isinstance(values, dict):
            raise ScheduleError(f'the schedule is {text.strip()}; write an object like {{"keep": {{"0": 0.8}}}}')
        known = [field.name for field in fields(cls)]
        if unknown := sorted(values.keys() - known):
            raise ScheduleError(
                f"unknown key {', '.join(map(repr, unknown))} in the schedule; remove it, "
                f"the keys are {', '.join(known)}"
            )
        if not isinstance(keep := values.get("keep"), dict):
            raise ScheduleError(f'keep is {keep!r} in the schedule; write "keep": {{"0": 0.8}}')
        return cls(**(values | {"keep": _blocks_of(keep.items())}))


def removed(n: int, keep_ratio: float) -> int:
    """How many of `n` tokens leave at `keep_ratio`: int((1 - keep_ratio) * n), in exact arithmetic.

    The ratio counts as the decimal that the user wrote: 0.8 of 10 removes 2, where floats say 1.

    Raises:
        ScheduleError: n is negative or not an integer, or keep_ratio is not in (0, 1].
    """
    if not _is_int(n) or n < 0:
        raise ScheduleError(f"the token count is {n!r}; pass an integer of at least 0")
    return int((1 - Fraction(str(_ratio(keep_ratio)))) * n)


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _block(value: Any) -> int:
    if not _is_int(value) or value < 0:
        raise ScheduleError(f"block index {value!r} in keep; write an integer of at least 0, counted from 0")
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


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ScheduleError(f"unknown {name} {value!r}; write one of {', '.join(map(repr, allowed))}")


def _protected(value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ScheduleError(f"protected is {value!r}; write token indices like (0, 1), or None to find them")
    tokens = tuple(value)
    for token in tokens:
        if not _is_int(token) or token < 0:
            raise ScheduleError(f"protected token {token!r}; write an integer of at least 0, its place in the sequence")
    return tuple(sorted({int(token) for token in tokens}))


def _blocks_of(pairs: Iterable[tuple[str, Any]]) -> dict[int, Any]:
    keep: dict[int, Any] = {}
    for text, ratio in pairs:
        if not _BLOCK_TEXT.fullmatch(text):
            raise ScheduleError(f"block index {text!r} in keep; write an integer of at least 0, counted from 0")
        if int(text) in keep:
            raise ScheduleError(f"block {text} has two keep ratios; keep one of them")
        keep[int(text)] = ratio
    return keep


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ScheduleError(f"key {key!r} stands twice in the schedule; keep one of them")
        values[key] = value
    return values
