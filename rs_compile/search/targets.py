"""The three targets: so many multiply-accumulates, so many times faster in measured time, or so little drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log

from rs_compile.search.climb import Climb, Trial
from rs_compile.search.finalists import Stopwatch
from rs_compile.search.methods import RANDOM
from rs_compile.search.pictures import SearchError

FINALISTS = 3
_OVER = 1.03  # so many times faster than asked is near enough
_TYPICAL = 0.96  # of what the arithmetic allows comes out in time, see BENCHMARKS.md
_TRIES = 9  # finalists timed at most
_BEST_SPEED = 1.25  # no graph was seen to be faster than its arithmetic by more
_HIGHEST, _NARROW = 0.97, 0.02  # shares of the dense cost


@dataclass(frozen=True)
class Target:
    """Exactly one of them: speed-up over torch.compile(model), share of its multiply-accumulates, or drift."""

    speedup: float | None = None
    macs: float | None = None
    drift: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name in ("speedup", "macs", "drift") if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            named = ", ".join(given) or "none"
            raise SearchError(f"give exactly one target, speedup=1.5, macs=0.65 or drift=0.01; given: {named}")
        ((name, value),) = given.items()
        fits = {"speedup": "above 1, like 1.5", "macs": "between 0 and 1, a share like 0.65", "drift": "above 0"}
        low, high = {"speedup": (1, inf), "macs": (0, 1), "drift": (0, inf)}[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
            raise SearchError(f"{name} is {value!r}; write a number {fits[name]}")

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"{self.speedup:g} times faster"
        if self.macs is not None:
            return f"{self.macs:g} of the multiply-accumulates"
        return f"drift of at most {self.drift:g}"


def reach(target: Target, climb: Climb, finalists: Stopwatch) -> Trial:
    """The schedule of the search.

    Raises:
        SearchError: nothing reaches the target; names the nearest.
    """
    _check_reach(target, climb)
    if target.macs is not None:
        return _by_macs(target.macs, climb, finalists)
    if target.speedup is not None:
        return _by_speed(target.speedup, climb, finalists)
    assert target.drift is not None
    return _by_drift(target.drift, climb, finalists)


def front(ranked: Sequence[Trial]) -> list[Trial]:
    """The first, and those that it is not better than by more than the standard error; random is no finalist."""
    first, *rest = [t for t in ranked if t.method.name != RANDOM] or list(ranked)
    near = [t for t in rest if t.measured is not None and first.measured is not None]
    within = [t for t in near if first.measured and t.measured and not first.measured.below(t.measured)]
    return [first, *within][:FINALISTS]


def _check_reach(target: Target, climb: Climb) -> None:
    if target.drift is not None:
        return
    share = target.macs if target.macs is not None else 1 / (_BEST_SPEED * (target.speedup or 1))
    nearest = climb.cheapest(share * climb.dense.macs)
    if nearest.macs > share * climb.dense.macs:
        left = nearest.macs / climb.dense.macs
        raise SearchError(
            f"nothing reaches {target}: the nearest is {left:.3f} of the dense model's multiply-accumulates "
            f"({nearest.method.name}, {nearest.shape.name}); ask for less"
        )


def _searched(climb: Climb, macs: float) -> list[Trial]:
    climb.screen(macs)
    if not climb.ranked(macs):
        tried = [t for t in climb.trials if t.target == macs]
        cheapest = min((t for t in tried if t.macs), key=lambda t: t.macs, default=None)
        if cheapest is None:
            raise SearchError(f"the model refuses every method:\n{_reasons(tried)}")
        raise SearchError(
            f"nothing reaches {macs / climb.dense.macs:.3f} of the multiply-accumulates: the nearest is "
            f"{cheapest.macs / climb.dense.macs:.3f} ({cheapest.method.name}, {cheapest.shape.name}); ask for less"
        )
    climb.refine(macs)
    return climb.ranked(macs)


def _reasons(tried: Sequence[Trial]) -> str:
    return "\n".join(f"  {t.method.name}: {t.refused}" for t in tried)


def _by_macs(share: float, climb: Climb, finalists: Stopwatch) -> Trial:
    ranked = front(_searched(climb, share * climb.dense.macs))
    climb.bar.expect(len(ranked))
    for trial in ranked:
        finalists.speedup(trial.schedule)
    return ranked[0]


def _by_speed(speedup: float, climb: Climb, finalists: Stopwatch) -> Trial:
    """Times the schedule of least drift; where it is too slow, it goes back among the others with fewer tokens.

    So the first that is fast enough has the least drift of all, each method at the arithmetic that it needs.
    """
    macs = _TYPICAL * climb.dense.macs / speedup
    ranked = _searched(climb, macs)
    queue = [t for t in ranked if t.method.name != RANDOM] or ranked
    nearest = 0.0
    for tries in range(_TRIES, 0, -1):
        climb.bar.expect(tries)
        trial = min(queue, key=lambda t: t.mean)
        queue.remove(trial)
        measured = finalists.speedup(trial.schedule).median
        nearest = max(nearest, measured)
        if measured >= speedup:
            return _slower(speedup, measured, trial, climb, finalists)
        # a hair faster than asked, so that noise does not call for another round
        queue += _scaled(trial, measured / (1.01 * speedup), climb)
        if not queue:
            break
    raise SearchError(
        f"nothing was {speedup:g} times faster than torch.compile(model) in measured time; the nearest was "
        f"{nearest:.2f} times. Ask for less, measure on a quieter machine, or with larger batches (batch_size)"
    )


def _slower(speedup: float, measured: float, trial: Trial, climb: Climb, finalists: Stopwatch) -> Trial:
    """The same with more tokens, where it is much faster than asked and stays fast enough."""
    if measured <= _OVER * speedup:
        return trial
    scaled = _scaled(trial, (measured / speedup) ** 0.8, climb)
    return next((t for t in scaled if t.mean < trial.mean and finalists.speedup(t.schedule).median >= speedup), trial)


def _scaled(trial: Trial, by: float, climb: Climb) -> list[Trial]:
    """The same shape at so many times the multiply-accumulates; none where it cannot be had."""
    cost = trial.target * by
    scaled = climb.at(trial.method, trial.shape, cost) if cost < climb.dense.macs else None
    return [scaled] if scaled is not None and scaled.reaches and scaled.schedule != trial.schedule else []


def _by_drift(drift: float, climb: Climb, finalists: Stopwatch) -> Trial:
    share = 0.7
    _searched(climb, share * climb.dense.macs)
    leaders = front(climb.ranked(share * climb.dense.macs))[:2]
    found = [t for leader in leaders if (t := _cheapest_below(drift, leader, share, climb)) is not None]
    if not found:
        nearest = min(climb.trials, key=lambda t: t.mean)
        raise SearchError(
            f"nothing keeps drift below {drift:g}: the nearest is {nearest.mean:.3g}, at "
            f"{nearest.macs / climb.dense.macs:.3f} of the multiply-accumulates ({nearest.method.name}); allow more"
        )
    climb.bar.expect(len(found))
    return max(found, key=lambda t: finalists.speedup(t.schedule).median)


def _cheapest_below(drift: float, leader: Trial, share: float, climb: Climb) -> Trial | None:
    """A shape scaled until its drift on the pictures that are searched on is just below what is allowed.

    Drift's logarithm is nearly linear in the share of the cost, so the next share is read off a line, within what is
    known to be too little and enough.
    """
    dense = climb.dense.macs
    low, high = 0.0, 1.0  # too much drift at low, none at high
    best, points = None, [(share, leader.mean)]
    trial: Trial | None = leader
    for _ in range(7):
        if trial is not None and trial.reaches:
            points.append((share, trial.mean))
            if trial.mean <= drift:
                best, high = trial, share
            else:
                low = share
        else:  # so few multiply-accumulates cannot be had
            low = share
        if high - low < _NARROW:
            break
        share = min(_HIGHEST, _next_share(points, drift, low, high))
        if share == low:
            break
        trial = climb.at(leader.method, leader.shape, share * dense)
    return best


def _next_share(points: Sequence[tuple[float, float]], drift: float, low: float, high: float) -> float:
    middle = (max(low, 0.1) + high) / 2
    different = list(dict.fromkeys(points))[-2:]
    if len(different) < 2 or different[0][0] == different[1][0] or min(d for _, d in different) <= 0:
        return middle
    (a, at_a), (b, at_b) = different
    steep = (log(at_b) - log(at_a)) / (b - a)
    share = b + (log(drift) - log(at_b)) / steep if steep else middle
    margin = 0.1 * (high - low)
    return min(max(share, low + margin), high - margin)
