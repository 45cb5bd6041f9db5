"""The tests marked `cuda`, run by pytest in this process; each is a row as soon as it is over."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import bench
from bench.gpu.document import Table
from bench.gpu.journal import CannotRun
from bench.gpu.plan import Setting, Step
from bench.gpu.rows import say
from bench.tables.results import Results, Row

ROOT = Path(str(bench.__file__)).parents[1]


def measure(step: Step, setting: Setting, results: Results) -> None:
    """A row for each test; those that an earlier run saw pass are left out.

    Raises:
        CannotRun: pytest or the tests are not here.
    """
    for package in ("pytest", "hypothesis"):
        if find_spec(package) is None:
            raise CannotRun(f"{package} is not installed; see --list-packages")
    if not (files := marked(ROOT / "tests")):
        raise CannotRun(f"there are no tests in {ROOT}; run the command from a checkout")
    import pytest

    passed = [row["test"] for row in results.rows if not row["failed"]]
    options = ["-o", "addopts=", "-q", "-m", "cuda", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    options += ["-c", str(ROOT / "pyproject.toml"), *(f"--deselect={test}" for test in passed)]
    if find_spec("xdist") is not None and (processes := min(4, (os.cpu_count() or 1) // 2)) > 1:
        options += ["-n", str(processes)]
    with torch.enable_grad():
        code = pytest.main([*options, *map(str, files)], plugins=[Recorder(results)])
    if not results.rows:
        raise RuntimeError(f"pytest ended with {code!r} before any test; see its output in the log")


def marked(folder: Path) -> list[Path]:
    """Test files that have tests for a GPU; the others would import what is not needed here."""
    return [file for file in sorted(folder.rglob("test_*.py")) if "mark.cuda" in file.read_text()]


class Recorder:
    """A plugin of pytest that keeps a row for each test, with the last words of what failed."""

    def __init__(self, results: Results) -> None:
        self._results = results

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test's call, or a fixture that failed before it."""
        if report.when != "call" and report.passed:
            return
        state = "passed" if report.passed else "skipped" if report.skipped else "failed"
        crash = getattr(report.longrepr, "reprcrash", None)
        words = " ".join(str(crash.message if crash else report.longrepr).split())[:300]
        values = {"state": state, "seconds": report.duration, "failed": "" if report.passed else words}
        say(f"{report.nodeid}: {state}")
        self._results.fill({"test": report.nodeid}, values)


def tables(rows: Sequence[Row]) -> list[Table]:
    """What did not pass, and how many did."""
    passed = sum(row["state"] == "passed" for row in rows)
    lines = [[row["test"], row["state"], row["failed"]] for row in rows if row["state"] != "passed"]
    verdicts = [f"tests marked cuda: {passed} of {len(rows)} passed"] if rows else []
    return [Table("Tests on the GPU", ("test that did not pass", "state", "why"), lines, verdicts)]
