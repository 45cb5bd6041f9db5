"""The speed table: `python -m bench.speed [--quick] [--only NAME] [--json FILE]`.

Both sides of a row run interleaved, A B A B, so that a machine that slows down slows both; a row's number is
the median over rounds of the ratio within a round, with its quartiles. With --json each row is saved when
it is done, and a second run measures only the rows that the file lacks (or those of --only, anew).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from tabulate import tabulate
from torch import Tensor, nn

from bench.models.umt import AttentionCode, Size, VisionEncoder, umt
from rs_compile import Schedule, optimize, plan
from rs_compile.timing import Call, Spread, compiled, interleaved

THREADS = 2
DEIT_SCHEDULE = Schedule({0: 0.8, 3: 0.8, 6: 0.8})
CLIP_SCHEDULE = Schedule({0: 0.8, 1: 0.8, 2: 0.8})

Measured = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How big and how often.

    Args:
        quick: small stand-ins for the models and few rounds, to see that every row runs.
        backend: torch.compile's, for both sides of a row.
        rounds: overrides the row's own number where given.
    """

    quick: bool
    backend: str
    rounds: int | None


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def deit(setting: Setting) -> tuple[nn.Module, tuple[int, int, int]]:
    """DeiT-S with random weights (speed does not depend on them), and the size of its images."""
    name, side = ("deit_tiny_patch16_224", 96) if setting.quick else ("deit_small_patch16_224", 224)
    return timm.create_model(name, img_size=side).eval(), (3, side, side)


def clip(setting: Setting, attention: AttentionCode) -> tuple[nn.Module, tuple[int, int, int, int]]:
    """UMT-B on 12 frames, 2352 tokens, and the size of its clips."""
    if setting.quick:
        return VisionEncoder(Size(96, 4, 3), frames=2, side=96, attention=attention).eval(), (3, 2, 96, 96)
    return umt("umt_b", attention=attention), (3, 12, 224, 224)


def sample(batch: int, size: tuple[int, ...]) -> Tensor:
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))


def pair(
    model: nn.Module,
    dense: Callable[..., Any],
    schedule: Schedule,
    inputs: Tensor,
    rounds: int,
    setting: Setting,
) -> Measured:
    """The optimized model against `dense`, interleaved."""
    optimized = optimize(model, schedule, backend=setting.backend, progress=say)
    calls: dict[str, Call] = {"baseline": lambda: dense(inputs), "rs_compile": lambda: optimized(inputs)}
    timing = interleaved(calls, rounds if setting.rounds is None else setting.rounds, say=say)
    report = optimized.report()
    return {
        "baseline_seconds": timing.of("baseline").to_dict(),
        "rs_compile_seconds": timing.of("rs_compile").to_dict(),
        "speed_up": timing.ratio("baseline", "rs_compile").to_dict(),
        "macs_ratio": report.macs_dense / report.macs,
        "tokens": [report.blocks[0].tokens_in, *(row.tokens_out for row in report.blocks)],
        "attention": sorted({row.attention_kernel for row in report.blocks}),
        "rounds_seconds": {name: list(values) for name, values in timing.seconds.items()},
    }


def deit_row(batch: int, schedule: Schedule, rounds: int) -> Callable[[Setting], Measured]:
    def measure(setting: Setting) -> Measured:
        model, size = deit(setting)
        inputs = sample(min(batch, 4) if setting.quick else batch, size)
        return pair(model, compiled(model, setting.backend), schedule, inputs, rounds, setting)

    return measure


def clip_against_compiled(setting: Setting) -> Measured:
    model, size = clip(setting, "sdpa")
    return pair(model, compiled(model, setting.backend), CLIP_SCHEDULE, sample(1, size), 11, setting)


def clip_against_eager(setting: Setting) -> Measured:
    """The model as published, uncompiled with hand-written attention; the compiler gets that same model."""
    model, size = clip(setting, "eager")
    return pair(model, model, CLIP_SCHEDULE, sample(1, size), 9, setting)


def capture_seconds(setting: Setting) -> Measured:
    """Capture and all passes: the first call of an uncompiled handle, less a later one."""
    model, size = deit(setting)
    inputs = sample(1, size)
    seconds = []
    for i in range(setting.rounds or (2 if setting.quick else 7)):
        say(f"capture {i + 1}")
        optimized = optimize(model, DEIT_SCHEDULE, backend="eager")
        started = time.perf_counter()
        optimized(inputs)
        first = time.perf_counter()
        optimized(inputs)
        seconds.append((first - started) - (time.perf_counter() - first))
    later = seconds[1:] or seconds  # the very first loads torch.export itself
    return {
        "seconds": Spread.of(tuple(later)).to_dict(),
        "first_seconds": seconds[0],
        "rounds_seconds": seconds,
    }


def merging_share(
    model: nn.Module, merge: Mapping[int, int], inputs: Tensor, rounds: int, setting: Setting
) -> Measured:
    """What matching and merging cost, as a share of the dense model's time: merged, less the same counts cut at random.

    Random selection scores and sorts as well, which is left in: it is small.
    """
    tokens, keep = plan(model, {}, inputs).blocks[0].tokens_in or 0, {}
    for block, r in merge.items():
        keep[block] = round((tokens - r - 0.5) / tokens, 9)  # int() takes the half token off again
        tokens -= r
    schedules = {"merged": Schedule(merge=merge), "cut": Schedule(keep, importance="random")}
    forwards: dict[str, Callable[..., Any]] = {
        "dense": compiled(model, setting.backend),
        **{name: optimize(model, s, backend=setting.backend, progress=say) for name, s in schedules.items()},
    }
    calls: dict[str, Call] = {name: partial(forward, inputs) for name, forward in forwards.items()}
    timing = interleaved(calls, rounds if setting.rounds is None else setting.rounds, say=say)
    one = zip(*(timing.seconds[name] for name in ("dense", "merged", "cut")), strict=True)
    return {
        "share": Spread.of(tuple((merged - cut) / dense for dense, merged, cut in one)).to_dict(),
        "speed_up": timing.ratio("dense", "merged").to_dict(),
        "rounds_seconds": {name: list(values) for name, values in timing.seconds.items()},
    }


def merging_deit(setting: Setting) -> Measured:
    model, size = deit(setting)
    r = 2 if setting.quick else 13
    return merging_share(model, dict.fromkeys(range(12), r), sample(4 if setting.quick else 16, size), 15, setting)


def merging_clip(setting: Setting) -> Measured:
    """vid-TLDR's counts for MSRVTT, the shares of them where quick."""
    model, size = clip(setting, "sdpa")
    counts = {0: 15, 1: 5, 2: 2} if setting.quick else {0: 600, 1: 200, 2: 100}
    return merging_share(model, counts, sample(1, size), 9, setting)


@dataclass(frozen=True)
class Row:
    """A row of the table: what is measured, and against what."""

    what: str
    baseline: str
    measure: Callable[[Setting], Measured]


COMPILED = "torch.compile(model)"
KEEP_ALL = Schedule({0: 1.0, 3: 1.0, 6: 1.0})
ROWS = {
    "deit-s-batch16": Row("DeiT-S, 20% after blocks 0, 3, 6, batch 16", COMPILED, deit_row(16, DEIT_SCHEDULE, 21)),
    "deit-s-batch1": Row("DeiT-S, 20% after blocks 0, 3, 6, batch 1", COMPILED, deit_row(1, DEIT_SCHEDULE, 41)),
    "deit-s-batch64": Row("DeiT-S, 20% after blocks 0, 3, 6, batch 64", COMPILED, deit_row(64, DEIT_SCHEDULE, 11)),
    "deit-s-keep-all": Row("DeiT-S, keep_ratio = 1, batch 16", COMPILED, deit_row(16, KEEP_ALL, 21)),
    "clip-compiled": Row("UMT-B, 2352 tokens, 20% after blocks 0-2", f"{COMPILED}, SDPA", clip_against_compiled),
    "clip-eager": Row("UMT-B, 2352 tokens, 20% after blocks 0-2", "eager, hand-written attention", clip_against_eager),
    "merge-deit-s": Row("matching and merging, DeiT-S, r = 13 a block, batch 16", "time of the dense", merging_deit),
    "merge-clip": Row("matching and merging, UMT-B, counts of MSRVTT", "time of the dense", merging_clip),
    "capture": Row("capture and all passes, DeiT-S, seconds", "-", capture_seconds),
}


def table(rows: dict[str, Measured], backend: str) -> str:
    """The rows measured so far, in the order of ROWS."""
    lines = []
    for name in (n for n in ROWS if n in rows):
        row, got = ROWS[name], rows[name]
        if "seconds" in got:
            lines.append([name, row.what, "", "", f"{got['seconds']['median']:.2f} s", spread(got["seconds"]), ""])
            continue
        ratio = got["speed_up"]
        if "share" in got:
            share = got["share"]
            low, high = 100 * share["quartile_low"], 100 * share["quartile_high"]
            speed_up = (
                f"{ratio['median']:.2f}x {spread(ratio)}; cost {100 * share['median']:.1f}% [{low:.1f}, {high:.1f}]"
            )
            lines.append([name, row.what, row.baseline, "", "", speed_up, ""])
            continue
        lines.append(
            [
                name,
                row.what,
                row.baseline if backend != "eager" else row.baseline.replace(COMPILED, "the model, uncompiled"),
                f"{1e3 * got['baseline_seconds']['median']:.1f}",
                f"{1e3 * got['rs_compile_seconds']['median']:.1f}",
                f"{ratio['median']:.2f}x {spread(ratio)}",
                f"{got['macs_ratio']:.2f}",
            ]
        )
    heads = ["row", "what", "baseline", "baseline ms", "rs_compile ms", "speed-up", "MAC ratio"]
    return tabulate(lines, heads, disable_numparse=True, colalign=("left",) * 3 + ("right",) * 2 + ("left", "right"))


def spread(value: dict[str, float]) -> str:
    return f"[{value['quartile_low']:.2f}, {value['quartile_high']:.2f}]"


def environment(setting: Setting) -> dict[str, Any]:
    """What a number depends on, besides the code."""
    return {
        "quick": setting.quick,
        "backend": setting.backend,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "processor": processor(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def saved(path: Path | None, settings: dict[str, Any]) -> dict[str, Measured]:
    """The rows that an earlier run left in `path`, if it ran with the same settings."""
    if path is None or not path.exists():
        return {}
    content = json.loads(path.read_text())
    if content["environment"] != settings:
        sys.exit(f"{path} holds rows of another setting, {content['environment']}; give another file")
    rows: dict[str, Measured] = content["rows"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the speed table; every row can run alone.")
    parser.add_argument("--quick", action="store_true", help="small models, 3 rounds: does every row run?")
    parser.add_argument("--only", action="append", choices=ROWS, metavar="NAME", help=f"one of {', '.join(ROWS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="saved after each row; rows in it are kept")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--rounds", type=int, help="instead of each row's own number")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    setting = Setting(args.quick, args.backend, args.rounds or (3 if args.quick else None))
    settings = environment(setting)
    rows = saved(args.json, settings)
    for name in args.only or [n for n in ROWS if n not in rows]:
        print(name, file=sys.stderr, flush=True)
        torch.compiler.reset()  # another batch size must not make this row's shapes dynamic
        torch.manual_seed(0)
        load = os.getloadavg()[0]
        with torch.no_grad():
            rows[name] = ROWS[name].measure(setting) | {"load_before": load}
        if args.json is not None:
            args.json.write_text(json.dumps({"environment": settings, "rows": rows}, indent=2) + "\n")
    if setting.quick:
        print("quick: small stand-ins for the models named, so that the numbers mean nothing")
    print(table(rows, args.backend))
    print(", ".join(f"{key} {value}" for key, value in settings.items()))


if __name__ == "__main__":
    main()
