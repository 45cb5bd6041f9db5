"""Runs the steps one after another, each in a process of its own that is ended when its time is over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.status import Status

from bench.gpu.journal import CANNOT, Journal, Outcome, reason_in
from bench.gpu.plan import Setting, Step
from bench.gpu.report import write_report
from bench.tables.results import UsageError

LEAST = 15.0  # seconds: in less a step does not even start
_LOOK = 0.2  # seconds between looks at a running step


def run_plan(steps: Sequence[Step], setting: Setting, out: Path, seconds: float) -> int:
    """Runs what the results in `out` lack, for so many seconds.

    Returns:
        0; 1 where a step failed or ran out of its time; 130 where the user stopped it.

    Raises:
        UsageError: the device is not there, or `out` holds other results.
    """
    check(setting)
    journal = Journal(out, setting)
    console = Console(stderr=True)
    todo = journal.in_order(steps)
    console.print(f"{len(todo)} of {len(steps)} steps to run in {seconds / 60:.3g} minutes, results in {out}")
    end = time.monotonic() + seconds
    stopped = False
    for at, step in enumerate(todo):
        left = end - time.monotonic()
        if stopped or left < LEAST:
            if step.name not in journal.outcomes:
                journal.note(step.name, Outcome("not run", reason="no time was left; run the command again"))
            continue
        with console.status("") as status:
            title = f"[{at + 1}/{len(todo)}] {step.title}, at most {min(step.limit, left):.0f} s"
            outcome = run_step(step, setting, out, left, title, status)
        stopped = outcome.state == "stopped"
        journal.note(step.name, outcome)
        _report(journal, steps, console)
        console.print(f"{step.name}: {outcome.state} ({outcome.seconds:.0f} s) {outcome.reason}", markup=False)
    _report(journal, steps, console)
    console.print(
        f"report: {out / 'report.html'}, tables: {out / 'RESULTS.md'}; the same command goes on", markup=False
    )
    if stopped:
        return 130
    mine = [journal.outcomes[step.name].state for step in steps if step.name in journal.outcomes]
    return int("failed" in mine or "out of time" in mine)


def _report(journal: Journal, steps: Sequence[Step], console: Console) -> None:
    """A report that cannot be made must not end the measuring: the rows are in results.json."""
    try:
        write_report(journal, steps)
    except Exception:
        console.print_exception()


def check(setting: Setting) -> None:
    """Raises UsageError where the device is not there; without touching it: a GPU may be for one process alone."""
    if setting.on_cuda and not torch.cuda.is_available():
        raise UsageError(
            f"--device {setting.device}: torch {torch.__version__} sees no CUDA device here "
            "(nvidia-smi says whether there is one); to rehearse without, pass --tiny --device cpu"
        )
    if not setting.on_cuda and not setting.tiny:
        raise UsageError(f"--device {setting.device}: these models take hours there; pass --tiny as well")


def run_step(step: Step, setting: Setting, out: Path, left: float, title: str, status: Status) -> Outcome:
    """Runs one step for at most its limit and what is left of the whole time.

    Args:
        left: seconds.
        title, status: shown while it runs, with the last line of its log.
    """
    if step.needs_cuda and not setting.on_cuda:
        return Outcome("cannot run", reason=step.needs_cuda)
    limit = min(step.limit, left)
    log = out / "logs" / f"{step.name}.log"
    given = [json.dumps(asdict(step)), str(out), json.dumps(asdict(setting))]
    command = [sys.executable, "-m", "bench.gpu.step", *given]
    # one cache for all steps and reruns: what was compiled once is there when the user stops and starts again
    environ = {"TORCHINDUCTOR_CACHE_DIR": str((out / "inductor").absolute()), **os.environ, "PYTHONUNBUFFERED": "1"}
    environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    )
    if not setting.on_cuda:
        environ.setdefault("OMP_NUM_THREADS", "1")  # threads of small models wait for each other
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environ, stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() - started < limit:
                status.update(f"{title}: {_last_words(log)}")
                time.sleep(_LOOK)
            code = process.poll()
            stopped = False
        except KeyboardInterrupt:
            code, stopped = None, True
        finally:
            _end(process)
    seconds = time.monotonic() - started
    if stopped:
        return Outcome("stopped", seconds, "by the user")
    if code is None:
        whose = "of the step" if limit == step.limit else "left of --minutes"
        return Outcome("out of time", seconds, f"after the {limit:.0f} s {whose}")
    if code == 0:
        return Outcome("done", seconds)
    reason = reason_in(log.read_text(errors="replace"))
    if code == CANNOT:
        return Outcome("cannot run", seconds, reason)
    ended = f"its process ended with {code} (-9: no memory left; -11: a fault in C)"
    return Outcome("failed", seconds, f"{reason or ended}; see {log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a step's process and all that it started, which are a group of their own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _last_words(log: Path) -> str:
    """The last line of progress, which starts with two spaces."""
    lines = [line for line in log.read_text(errors="replace")[-4000:].splitlines() if line.startswith("  ")]
    return lines[-1].strip()[:100].replace("[", "(") if lines else "starting"
