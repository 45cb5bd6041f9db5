"""What the compiler itself costs: matching and merging as shares of a forward pass, capture, passes and calls."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from bench.tables.options import chosen
from bench.tables.results import Results, Row, environment
from bench.throughput.networks import NETWORKS, Network
from passes.sites.mergers import Merger
from rs_compile import Random, Schedule, Stream, Ward, optimize, plan
from rs_compile.arguments import positive
from rs_compile.state import StateReader
from rs_compile.timing import Call, Spread, compiled, interleaved

CAPTURED = Schedule({0: 0.8, 3: 0.8, 6: 0.8})


@dataclass(frozen=True)
class Setting:
    """How big and how often.

    Args:
        quick: small stand-ins for the models, to see that every row runs.
        backend: torch.compile's, for all sides of a row.
        rounds: of timing.
    """

    quick: bool
    backend: str
    rounds: int


def say(text: str) -> None:
    """A line of progress."""
    print(f"  {text}", file=sys.stderr, flush=True)


def capture_seconds(network: Network, setting: Setting) -> Row:
    """Capture and all passes: the first call of an uncompiled handle, less a later one."""
    model, inputs = network.make(setting.quick), network.inputs(1, setting.quick)
    seconds = []
    for i in range(setting.rounds + 1):  # the very first loads torch.export itself
        say(f"capture {i + 1}")
        optimized = optimize(model, CAPTURED, backend="eager")
        started = time.perf_counter()
        optimized(inputs)
        first = time.perf_counter()
        optimized(inputs)
        seconds.append((first - started) - (time.perf_counter() - first))
    return {"seconds": Spread.of(tuple(seconds[1:])).to_dict(), "first_seconds": seconds[0], "rounds_seconds": seconds}


def state_seconds(network: Network, setting: Setting) -> Row:
    """What a handle asks of its model at every call; and after 128 MB went through the caches."""
    reader, much, seconds = StateReader(network.make(setting.quick)), torch.zeros(32 << 20), {}
    for name, calls in {"warm": 100, "cold": 1}.items():
        one = []
        for _ in range(setting.rounds):
            much.add_(1)
            if name == "warm":
                reader()
            started = time.perf_counter()
            for _ in range(calls):
                reader()
            one.append((time.perf_counter() - started) / calls)
        seconds[name] = one
    return {
        "milliseconds": Spread.of(tuple(1e3 * s for s in seconds["warm"])).to_dict(),
        "cold_milliseconds": Spread.of(tuple(1e3 * s for s in seconds["cold"])).to_dict(),
        "rounds_seconds": seconds,
    }


def merging_share(
    network: Network, merge: Mapping[int, int], batch: int, setting: Setting, by: Merger = Stream()
) -> Row:
    """What matching and merging cost, as a share of the dense model's time: merged, less the same counts cut at random.

    Random selection scores and sorts as well, which is left in: it is small.
    """
    model, inputs = network.make(setting.quick), network.inputs(batch, setting.quick)
    tokens, keep = plan(model, {}, inputs).blocks[0].tokens_in or 0, {}
    for block, r in merge.items():
        keep[block] = round((tokens - r - 0.5) / tokens, 9)  # int() takes the half token off again
        tokens -= r
    schedules = {"merged": Schedule(merge=merge, by=by), "cut": Schedule(keep, score=Random())}
    forwards: dict[str, Callable[..., Any]] = {
        "dense": compiled(model, setting.backend),
        **{name: optimize(model, s, backend=setting.backend, progress=say) for name, s in schedules.items()},
    }
    calls: dict[str, Call] = {name: partial(forward, inputs) for name, forward in forwards.items()}
    timing = interleaved(calls, setting.rounds, say=say)
    one = zip(*(timing.seconds[name] for name in ("dense", "merged", "cut")), strict=True)
    return {
        "share": Spread.of(tuple((merged - cut) / dense for dense, merged, cut in one)).to_dict(),
        "speed_up": timing.ratio("dense", "merged").to_dict(),
        "rounds_seconds": {name: list(values) for name, values in timing.seconds.items()},
    }


def merging_deit(setting: Setting, by: Merger = Stream()) -> Row:
    """ToMe's r = 13 in every block; the stand-in has 7 blocks and 17 tokens."""
    merge = dict.fromkeys(range(7), 1) if setting.quick else dict.fromkeys(range(12), 13)
    return merging_share(NETWORKS["DeiT-S"], merge, 2 if setting.quick else 16, setting, by)


def merging_umt(setting: Setting) -> Row:
    """vid-TLDR's counts for MSRVTT."""
    counts = {0: 8, 1: 3, 2: 1} if setting.quick else {0: 600, 1: 200, 2: 100}
    return merging_share(NETWORKS["UMT-B"], counts, 1, setting)


ROWS: dict[str, tuple[str, Callable[[Setting], Row]]] = {
    "merge-deit-s": ("matching and merging, DeiT-S, r = 13 a block, batch 16, share of the dense time", merging_deit),
    "ward-deit-s": (
        "the same by Ward's cost, at the inputs of attention",
        lambda setting: merging_deit(setting, Ward()),
    ),
    "merge-umt-b": ("matching and merging, UMT-B, counts of MSRVTT, share of the dense time", merging_umt),
    "state": (
        "a handle's look at its model at every call, DeiT-S, ms; cold caches in the last column",
        lambda setting: state_seconds(NETWORKS["DeiT-S"], setting),
    ),
    "capture": (
        "capture and all passes, DeiT-S, seconds",
        lambda setting: capture_seconds(NETWORKS["DeiT-S"], setting),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the table."""
    parser.add_argument("--quick", action="store_true", help="small stand-ins, uncompiled: does every row run?")
    parser.add_argument("--only", type=chosen(list(ROWS)), default=list(ROWS), metavar="NAME,...", help="some rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, saved as they are measured; a rerun goes on")
    parser.add_argument("--backend", choices=("inductor", "eager"), help="default inductor; with --quick eager")
    parser.add_argument("--rounds", type=positive, help="of timing (default 9)")
    parser.add_argument("--threads", type=positive, help="CPU threads, torch's own choice if not given")


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Measures the rows that the file lacks, and prints them all; returns the exit code."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    backend = args.backend or ("eager" if args.quick else "inductor")
    setting = Setting(args.quick, backend, args.rounds or (2 if args.quick else 9))
    results = Results(args.json, environment("costs", {**vars(setting)}))
    for name in args.only:
        if results.lacking([{"row": name}], "rounds_seconds"):
            say(name)
            torch.compiler.reset()
            torch.manual_seed(0)
            results.fill({"row": name}, ROWS[name][1](setting))
    if args.quick:
        print("quick: small stand-ins for the models named, so that the numbers mean nothing")
    lines = [[name, ROWS[name][0], *_cells(results.row({"row": name}))] for name in args.only]
    print(tabulate(lines, ["row", "what", "cost [quartiles]", "speed-up [quartiles]"], disable_numparse=True))
    return 0


def _cells(row: Row) -> tuple[str, str]:
    if "seconds" in row:
        return _spread(row["seconds"], "{:.2f} s"), ""
    if "milliseconds" in row:
        return _spread(row["milliseconds"], "{:.3f} ms"), _spread(row["cold_milliseconds"], "{:.3f} ms cold")
    return _spread({k: 100 * v for k, v in row["share"].items()}, "{:.1f}%"), _spread(row["speed_up"], "{:.2f}x")


def _spread(value: Mapping[str, float], form: str) -> str:
    low, high = value["quartile_low"], value["quartile_high"]
    return f"{form.format(value['median'])} [{low:.2f}, {high:.2f}]"
