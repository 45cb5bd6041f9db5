"""Rows of a table, kept in a JSON file while they are measured, so that an interrupted run goes on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from passes.graph.base import CompileError
from passes.graph.codes import Code

Row = dict[str, Any]


class UsageError(CompileError):
    """An option, a folder or a file that a command cannot follow; says what to do."""

    family = Code.COMMAND


def first_process() -> bool:
    """Whether this process prints and saves; the others are those that torchrun started beside it."""
    return os.environ.get("RANK", "0") == "0"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def commit() -> str:
    """The commit of the code that runs, "+" where it was changed since."""
    done = subprocess.run(
        ["git", "describe", "--always", "--exclude=*", "--dirty=+"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def environment(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers of a command depend on, besides the code and what each row says itself."""
    where = {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        where["gpu"] = torch.cuda.get_device_name()
    content: dict[str, Any] = json.loads(json.dumps({"command": command, **settings, **where}))
    return content


def accuracy_of(row: Row) -> float | None:
    """Accuracy in percent; on pictures without labels agreement with the dense model; None where not measured."""
    value = row.get("accuracy")
    return row.get("agreement") if value is None else value


def shown(row: Row) -> str:
    """`accuracy_of` for a table."""
    value = accuracy_of(row)
    return "" if value is None else f"{value:.1f}"


class Results:
    """The rows of one command, saved after every change.

    Args:
        path: a JSON file that an earlier run of the same command and settings may have left; None to keep nothing.
        settings: see `environment`.

    Raises:
        UsageError: the file is of other settings, or no such file can be written.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._settings = dict(settings)
        self.rows: list[Row] = []
        if path is None:
            return
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UsageError(f"--json {path}: no file can be written there; give one in a directory that exists")
        if path.exists():
            self.rows = _rows(path, self._settings)

    def row(self, identity: Mapping[str, Any]) -> Row:
        """The row of this identity, empty where there is none."""
        same = (row for row in self.rows if all(row.get(key) == value for key, value in identity.items()))
        return next(same, {})

    def lacking(self, identities: Sequence[Mapping[str, Any]], column: str) -> bool:
        """Whether one of these rows has no such column yet."""
        return any(column not in self.row(identity) for identity in identities)

    def fill(self, identity: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Adds columns to a row, and saves."""
        row = self.row(identity)
        if not row:
            row.update(identity)
            self.rows.append(row)
        row.update(values)
        if self._path is not None and first_process():
            fresh = self._path.with_name(f"{self._path.name}.new")
            fresh.write_text(json.dumps({"environment": self._settings, "rows": self.rows}, indent=2) + "\n")
            fresh.replace(self._path)


def _rows(path: Path, settings: dict[str, Any]) -> list[Row]:
    way_out = "give another --json file, or delete this one"
    try:
        content = json.loads(path.read_text())
        found, rows = content["environment"], content["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"--json {path} exists and is no result of this command; {way_out}") from None
    if found != settings:
        keys = [k for k in {**found, **settings} if found.get(k) != settings.get(k)]
        differs = "; ".join(f"{k} {found.get(k)} there, {settings.get(k)} here" for k in keys)
        raise UsageError(f"--json {path} holds rows of another setting ({differs}); {way_out}")
    return list(rows)
