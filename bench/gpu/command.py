"""Every claim about GPUs, measured by one command: kernels, launches, speed, memory, compile time, open questions.

A plan of steps, the most telling first, each in a process of its own with a time limit. What a step has measured is
kept after every row; `results.json`, `RESULTS.md` and `report.html` are written after every step. Stopped at any
moment, the same command goes on: with what was never run, then with what ran out of time, then with what failed.
Models have random weights; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.gpu.packages import missing, table
from bench.gpu.plan import STEPS, TINY_STEPS, Setting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the plan."""
    parser.add_argument("--minutes", type=_minutes, default=10.0, help="for all steps together (default 10)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="of results.json (rows, as JSON), RESULTS.md and report.html; a rerun goes on (default gpu-results)",
    )
    parser.add_argument("--only", type=_steps, metavar="STEP,...", help=f"some of {', '.join(STEPS)}")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:0; cpu with --tiny (default cuda)")
    parser.add_argument("--tiny", action="store_true", help="small stand-ins, to rehearse: does every step run?")
    parser.add_argument(
        "--list-packages", action="store_true", help="what is needed besides torch, and what of it is missing here"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the steps that the results lack; returns the exit code, 1 where a step failed."""
    if args.list_packages:
        print(table())
        return 0
    if lacking := [package for package in missing() if package.required]:
        print(f"these packages are missing: {', '.join(p.name for p in lacking)}\n\n{table()}", file=sys.stderr)
        return 2
    from bench.gpu.runner import run_plan  # only now: it needs them

    plan = TINY_STEPS if args.tiny else STEPS
    chosen = [step for name, step in plan.items() if args.only is None or name in args.only]
    out = args.out or Path("gpu-results-tiny" if args.tiny else "gpu-results")
    return run_plan(chosen, Setting(args.device, args.tiny), out, 60 * args.minutes)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes above 0")
    return minutes


def _steps(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in STEPS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no step; there are {', '.join(STEPS)}")
    return names
