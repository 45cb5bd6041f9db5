"""What became of each step, in `results.json`, and how a step's process says it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bench.gpu.plan import Setting, Step
from bench.tables.results import Row, UsageError

State = Literal["done", "failed", "out of time", "cannot run", "stopped", "not run"]
CANNOT = 3  # exit code of a step that cannot run here
_MARK = "reason: "  # starts the last line of a step that did not get through


class CannotRun(RuntimeError):
    """A step cannot run on this machine; says why."""


def said(reason: str) -> str:
    """The last line of a step's log."""
    return _MARK + " ".join(reason.split())


def reason_in(log: str) -> str:
    """What `said` wrote, "" where the step was ended from outside."""
    last = log.rstrip("\n").rpartition("\n")[2]
    return last.removeprefix(_MARK) if last.startswith(_MARK) else ""


def rows_file(out: Path, step: str) -> Path:
    """A step's rows, written by its process after each."""
    return out / "steps" / f"{step}.json"


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Args:
        state: "stopped" is by the user.
        seconds: that it took.
        reason: why it is not "done".
    """

    state: State
    seconds: float = 0.0
    reason: str = ""


class Journal:
    """The outcomes of all steps and their rows, kept in `results.json`.

    Raises:
        UsageError: the directory holds results of another setting, or cannot be written.
    """

    def __init__(self, out: Path, setting: Setting) -> None:
        self.out, self._setting, self._file = out, asdict(setting), out / "results.json"
        self.outcomes: dict[str, Outcome] = {}
        self._steps: dict[str, Any] = {}
        try:
            rows_file(out, "").parent.mkdir(parents=True, exist_ok=True)
            (out / "logs").mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {out}: {error.strerror}; give a directory that can be made") from None
        if not self._file.exists():
            return
        try:
            content = json.loads(self._file.read_text())
            found = content["setting"]
            self.outcomes = {name: Outcome(**outcome) for name, outcome in content["outcomes"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{self._file} is no result of this command; give another --out") from None
        if found != self._setting:
            raise UsageError(f"{self._file} holds results of {found}, not of {self._setting}; give another --out")

    @property
    def tiny(self) -> bool:
        """Whether these are numbers of small stand-ins."""
        return bool(self._setting["tiny"])

    def note(self, step: str, outcome: Outcome) -> None:
        """Keeps an outcome, and saves."""
        self.outcomes[step] = outcome
        self.save()

    def save(self) -> None:
        """Writes `results.json`, rows of all steps among it."""
        content = {
            "setting": self._setting,
            "outcomes": {name: asdict(outcome) for name, outcome in self.outcomes.items()},
            "environments": {name: env for name in self.outcomes if (env := self._content(name).get("environment"))},
            "rows": {name: self.rows(name) for name in self.outcomes},
        }
        fresh = self._file.with_name("results.json.new")
        fresh.write_text(json.dumps(content, indent=1) + "\n")
        fresh.replace(self._file)

    def rows(self, step: str) -> list[Row]:
        """What a step has measured so far."""
        rows: list[Row] = self._content(step).get("rows", [])
        return rows

    def environment(self) -> Mapping[str, Any]:
        """Of the first step that has any."""
        return next((env for name in self.outcomes if (env := self._content(name).get("environment"))), {})

    def in_order(self, steps: Sequence[Step]) -> list[Step]:
        """The steps to run: never run before ones out of time, these before failed ones; the others are done."""
        turns: list[tuple[State, ...]] = [("not run", "stopped"), ("out of time",), ("failed", "cannot run")]
        states = {step.name: self.outcomes.get(step.name, Outcome("not run")).state for step in steps}
        return [step for turn in turns for step in steps if states[step.name] in turn]

    def _content(self, step: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(rows_file(self.out, step).read_text())
        except (OSError, ValueError):
            return {}
        return content
