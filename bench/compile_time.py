"""What compiling costs: against torch.compile(model), against torch.export, by depth, and in memory.

Four tables. "compile": seconds of the first call of the pruned and of the dense model, each in a process of its own,
with an empty Inductor cache (cold) and with the one just filled (warm). "passes": seconds of this compiler's own passes
beside torch.export's. "growth": how both grow with the number of blocks, and the calls into the passes' functions,
which depend on no clock. "memory": the peak of a forward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.export import Dim, export

import passes
from bench.memory import peak_bytes
from bench.models.umt import umt
from bench.tables.options import chosen
from bench.tables.results import environment
from passes.pipeline import prepare
from rs_compile import Schedule, optimize
from rs_compile.arguments import positive
from rs_compile.rewrite import rewrite
from rs_compile.timing import wait_for

PARTS = ("compile", "passes", "growth", "memory")
SCHEDULE = Schedule({0: 0.8, 3: 0.8, 6: 0.8})
_PASSES = os.path.dirname(str(passes.__file__))

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables as JSON too")
    parser.add_argument("--quick", action="store_true", help="small stand-ins, uncompiled: does every row run?")
    parser.add_argument("--parts", type=chosen(PARTS), default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=positive, default=3, help="of every time, medians are shown (default 3)")
    parser.add_argument("--threads", type=positive, help="CPU threads, torch's own choice if not given")


def run(args: argparse.Namespace) -> int:
    """Prints the tables."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    tables = {"compile": compile_times, "passes": pass_times, "growth": growth, "memory": memory}
    content: dict[str, Any] = environment("compile-time", {"quick": args.quick, "rounds": args.rounds})
    for part in args.parts:
        rows = content[part] = tables[part](args.quick, args.rounds)
        print(f"{part}\n{tabulate(rows, headers='keys', floatfmt='.2f')}\n", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


def deit(depth: int, quick: bool) -> tuple[nn.Module, Tensor]:
    """DeiT-S with so many blocks and a batch of 8; in a quick run a small stand-in."""
    name, side = ("test_vit", 64) if quick else ("deit_small_patch16_224", 224)
    return timm.create_model(name, img_size=side, depth=depth).eval(), torch.zeros(8, 3, side, side)


def compile_times(quick: bool, rounds: int) -> list[Row]:
    """First calls in fresh processes, cold and warm, sides in turns."""
    seconds: dict[str, dict[str, list[float]]] = {"cold": {}, "warm": {}}
    for _ in range(rounds):
        for side in ("dense", "pruned"):
            for start, one in cold_and_warm(side, quick, "cpu").items():
                seconds[start].setdefault(side, []).append(one)
    rows = []
    for start, sides in seconds.items():
        dense, pruned = median(sides["dense"]), median(sides["pruned"])
        rows.append({"start": start, "torch.compile s": dense, "rs_compile s": pruned, "ratio": pruned / dense})
    return rows


def cold_and_warm(side: str, quick: bool, device: str) -> dict[str, float]:
    """Seconds of the first call in two fresh processes: with an empty Inductor cache, and with what that one left."""
    with tempfile.TemporaryDirectory() as cache:
        return {start: _in_a_process(side, cache, quick, device) for start in ("cold", "warm")}


def _in_a_process(side: str, cache: str, quick: bool, device: str) -> float:
    environ = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "bench.compile_time", side, str(int(quick)), threads, device]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def first_call(side: str, quick: bool, device: torch.device) -> float:
    """Seconds of the first call in this process, everything imported before; uncompiled in a quick run.

    float32 on a CPU, float16 elsewhere, where float32 has no flash attention.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    model, images = deit(12, quick)
    model, images = model.to(device, dtype), images.to(device, dtype)
    backend = "eager" if quick else "inductor"
    wait = wait_for(device)
    wait()
    started = time.perf_counter()
    made = torch.compile(model, backend=backend) if side == "dense" else optimize(model, SCHEDULE, backend=backend)
    with torch.no_grad():
        made(images)
    wait()
    return time.perf_counter() - started


def pass_times(quick: bool, rounds: int) -> list[Row]:
    """torch.export alone, and capture and passes together, in this process after a first model."""
    measured(*deit(2, True), Schedule({0: 0.5}))
    subjects: Mapping[str, Callable[[], tuple[nn.Module, Tensor]]] = {
        "DeiT-S, 12 blocks": lambda: deit(12, quick),
        "DeiT-S, 24 blocks": lambda: deit(24, quick),
        "UMT-L, 24 blocks": lambda: clips(quick),
    }
    rows = []
    for name, build in subjects.items():
        model, inputs = build()
        times = [measured(model, inputs, SCHEDULE) for _ in range(rounds)]
        alone, total, own = (median(column) for column in zip(*times, strict=True))
        rows.append({"model": name, "torch.export s": alone, "passes s": own, "all s": total, "ratio": total / alone})
    return rows


def clips(quick: bool) -> tuple[nn.Module, Tensor]:
    """UMT-L on the meta device with two clips of 12 frames; in a quick run UMT-B on few and small ones."""
    with torch.device("meta"):
        model = umt("umt_b", frames=2, side=64, depth=8) if quick else umt("umt_l")
        return model, torch.empty(2, 3, 2, 64, 64) if quick else torch.empty(2, 3, 12, 224, 224)


def measured(model: nn.Module, inputs: Tensor, schedule: Schedule) -> tuple[float, float, float]:
    """Seconds of torch.export alone, of everything before torch.compile, and of that the passes'."""
    started = time.perf_counter()
    export(model, (inputs,), dynamic_shapes=({0: Dim.AUTO},), strict=False)
    stages = [time.perf_counter()]  # export alone; capture; everything behind it
    prepared = prepare(model, (inputs,), {}, lower=True, say=lambda _: stages.append(time.perf_counter()))
    rewrite(prepared.gm, schedule, compact=False, force=False, explicit=False, drop_unread=True)
    ended = time.perf_counter()
    return stages[0] - started, ended - stages[0], ended - stages[-1]


def growth(quick: bool, rounds: int) -> list[Row]:
    """The same by depth, and the work of the passes in calls of their functions."""
    rows = []
    for depth in (7, 14) if quick else (12, 24, 48, 96):
        model, images = deit(depth, True)
        times = [measured(model, images, SCHEDULE) for _ in range(rounds)]
        alone, total, own = (median(column) for column in zip(*times, strict=True))
        work = calls_of_passes(model, images, SCHEDULE)
        rows.append(
            {
                "blocks": depth,
                "torch.export s": alone,
                "passes s": own,
                "ratio": total / alone,
                "passes ms a block": 1e3 * own / depth,
                "calls a block": work / depth,
            }
        )
    return rows


def calls_of_passes(model: nn.Module, inputs: Tensor, schedule: Schedule) -> int:
    """How many calls of functions in passes/ it takes to rewrite a captured model."""
    prepared = prepare(model, (inputs,), {}, lower=True)
    count = 0

    def note(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(_PASSES)

    sys.setprofile(note)
    try:
        rewrite(prepared.gm, schedule, compact=False, force=False, explicit=False, drop_unread=True)
    finally:
        sys.setprofile(None)
    return count


@torch.no_grad()
def memory(quick: bool, _: int) -> list[Row]:
    """Peaks of dense and pruned, both compiled; uncompiled in a quick run."""
    model, images = deit(12, quick)
    dense = model if quick else torch.compile(model)
    pruned = optimize(model, SCHEDULE, backend="eager" if quick else "inductor")
    dense(images), pruned(images)
    peaks = [peak_bytes(partial(made, images)) / 2**20 for made in (dense, pruned)]
    return [{"dense MiB": peaks[0], "pruned MiB": peaks[1], "ratio": peaks[1] / peaks[0]}]


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(first_call(sys.argv[1], bool(int(sys.argv[2])), torch.device(sys.argv[4])))
