"""Among methods and shapes: the best schedule that costs a number of multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from rs_compile.schedule import Schedule
from rs_compile.search.costs import CostModel, Counted, bisecting, fitting
from rs_compile.search.evaluation import Evaluator, Measured
from rs_compile.search.methods import RANDOM, Method, keep_ratios
from rs_compile.search.pictures import SearchError
from rs_compile.search.progress import Bar
from rs_compile.search.shapes import Shape

NEAR = 1.5  # a method is refined where its drift is at most so many times the lowest
_MOVES = 7  # tried at most for a method at one cost


@dataclass(frozen=True, eq=False)
class Trial:
    """A schedule that was tried.

    Args:
        method: how tokens leave.
        shape: how they are spread over the blocks, None with a refusal.
        macs: multiply-accumulates of one picture, counted on the rewritten graph.
        measured: drift on the pictures that were searched on.
        refused: why it could not be, "" where it was.
        target: the multiply-accumulates that it was asked to stay below.
    """

    method: Method
    shape: Shape
    schedule: Schedule
    macs: int
    measured: Measured | None
    refused: str = ""
    target: float = 0.0

    @property
    def reaches(self) -> bool:
        """Whether it could be made as cheap as was asked."""
        return self.measured is not None and self.macs <= self.target

    @property
    def mean(self) -> float:
        return self.measured.mean if self.measured is not None else float("inf")


@dataclass
class Climb:
    """Tries schedules and remembers them all.

    Args:
        methods: to choose among.
        tokens: that reach each block, or rows of each stage.
        able: the blocks or stages that tokens may leave in, ascending.
        dense: what the model costs.
        every: refine every method, not only those near the best.
    """

    evaluator: Evaluator
    methods: Sequence[Method]
    tokens: Sequence[int]
    able: Sequence[int]
    dense: Counted
    bar: Bar
    every: bool = False
    trials: list[Trial] = field(default_factory=list)
    screened: list[float] = field(default_factory=list)  # multiply-accumulates that every method was tried at
    _costs: CostModel | None = None
    _known: dict[tuple[str, Shape, float], Trial | None] = field(default_factory=dict)
    _out: set[str] = field(default_factory=set)  # methods that this model refuses

    def counts(self, method: Method, shape: Shape, scale: float) -> dict[int, int]:
        """How many leave where."""
        return shape.counts(scale, self.tokens, self.where(method), method.merges)

    def where(self, method: Method) -> Sequence[int]:
        """The blocks that this method may use: none at the end where what leaves would be read by nothing."""
        return [b for b in self.able if b < len(self.tokens) - method.spare] or self.able[:1]

    def starts(self, method: Method) -> list[Shape]:
        """The shapes that it starts from."""
        return list(dict.fromkeys(method.starts(len(self.tokens), self.where(method))))

    def published(self, trial: Trial) -> bool:
        """Whether its shape is one that others published."""
        return trial.shape in trial.method.given(len(self.tokens), self.where(trial.method))

    def cheapest(self, macs: float) -> Trial:
        """A schedule of at most these multiply-accumulates, tried on no picture; the cheapest where there is none.

        Raises:
            SearchError: none of the methods fits the model.
        """
        found, refused = list[Trial](), []
        for method in sorted(self.methods, key=lambda m: m.merges):  # pruning reaches furthest
            self.bar.say(f"{method.name}: how far it reaches")
            shape = self.starts(method)[0]
            counts = next((c for scale in (1.0, 0.5, 0.25) if (c := self.counts(method, shape, scale))), {})
            if not counts:
                refused.append(f"  {method.name}: of {max(self.tokens)} tokens none can leave, a few stay in any case")
                continue
            schedule = self._schedule(method, counts)
            counted = self.evaluator.count(schedule)
            if counted is None:
                refused.append(f"  {method.name}: {self.evaluator.refusal(schedule)}")
                continue
            if not method.grid:
                self._model().learn(counted, partial(method.place, counts))
            found.append(Trial(method, shape, schedule, counted.macs, None))
            if counted.macs <= macs:
                return found[-1]
        if not found:
            raise SearchError("the model refuses every method:\n" + "\n".join(refused))
        return min(found, key=lambda trial: trial.macs)

    def screen(self, macs: float) -> None:
        """Every method with the shapes that it starts from."""
        self.screened.append(macs)
        starts = [(m, s) for m in self.methods for s in self.starts(m)]
        for i, (method, shape) in enumerate(starts):
            self.bar.expect(len(starts) - i + 2 * _MOVES)
            self.at(method, shape, macs)

    def at(self, method: Method, shape: Shape, macs: float) -> Trial | None:
        """A shape scaled to cost at most `macs`; None where nothing leaves or the method does not fit the model."""
        key = (method.name, shape, macs)
        if key not in self._known and method.name not in self._out:
            self.bar.say(f"{method.name}, {shape.name}")
            self._known[key] = trial = self._try(method, shape, macs)
            if trial is not None:
                self.trials.append(trial)
            self.bar.step()
        return self._known.get(key)

    def best(self, method: Method, macs: float) -> Trial | None:
        """The least drift of those tried at this cost."""
        found = [t for t in self.trials if t.method is method and t.target == macs and t.reaches]
        return min(found, key=lambda t: t.mean, default=None)

    def ranked(self, macs: float) -> list[Trial]:
        """The best of each method at this cost, least drift first."""
        found = [best for method in self.methods if (best := self.best(method, macs)) is not None]
        return sorted(found, key=lambda t: t.mean)

    def refine(self, macs: float) -> None:
        """Local moves from the best shape of each method that is near the best; each must win by its standard error."""
        ranked = self.ranked(macs)
        near = [t.method for t in ranked if self.every or t.mean <= NEAR * ranked[0].mean]
        near = [m for m in near if self.every or m.name != RANDOM]
        for i, method in enumerate(near):
            self.bar.expect(_MOVES * (len(near) - i))
            self._refine(method, macs)

    def _refine(self, method: Method, macs: float) -> None:
        best, moves = self.best(method, macs), 0
        moved = True
        while best is not None and moved:
            moved = False
            for shape in best.shape.neighbours(self.where(method)):
                if (method.name, shape, macs) in self._known:
                    continue
                if moves == _MOVES:
                    return
                moves += 1
                trial = self.at(method, shape, macs)
                if trial is not None and trial.reaches and _wins(trial, best):
                    best, moved = trial, True
                    break

    def _try(self, method: Method, shape: Shape, macs: float) -> Trial | None:
        def of(scale: float) -> dict[int, int]:
            return self.counts(method, shape, scale)

        def place(block: int) -> str:
            return method.place(of(0.5), block)

        found: list[tuple[int, Schedule]] = []
        last: Schedule | None = None
        refusal = ""
        fitted = bisecting(of, macs) if method.grid else fitting(of, self._model(), place, macs)
        for counts, give in fitted:
            last = self._schedule(method, counts)
            counted = self.evaluator.count(last)
            if counted is None:
                refusal = self.evaluator.refusal(last)
                continue
            give(counted)
            found.append((counted.macs, last))
        if not found:
            if last is None:
                return None
            if not any(t.method is method and not t.refused for t in self.trials):
                self._out.add(method.name)
            return Trial(method, shape, last, 0, None, refusal, macs)
        within = [f for f in found if f[0] <= macs]
        cost, schedule = max(within, key=lambda f: f[0]) if within else min(found, key=lambda f: f[0])
        measured = self.evaluator.measure(schedule, "search", method.draws) if within else None
        return Trial(method, shape, schedule, cost, measured, "" if within else "costs more", macs)

    def _model(self) -> CostModel:
        if self._costs is None:
            self._costs = CostModel(self.dense)
        return self._costs

    def _schedule(self, method: Method, counts: dict[int, int]) -> Schedule:
        return method.make(counts, {} if method.grid else keep_ratios(counts, self.tokens))


def _wins(trial: Trial, best: Trial) -> bool:
    return trial.measured is not None and best.measured is not None and trial.measured.below(best.measured)
