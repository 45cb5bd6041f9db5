"""CUDA graphs: whether `mode="reduce-overhead"` records a rewritten model, replays it rightly, and what that gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.document import Table
from bench.gpu.plan import Setting, Step
from bench.gpu.rows import fill_row, forget, say
from bench.gpu.verdict import in_words
from bench.tables.results import Results, Row
from bench.throughput.networks import NETWORKS
from rs_compile import Schedule, optimize
from rs_compile.commands import DTYPES
from rs_compile.timing import interleaved

MODEL = "DeiT-S"
SCHEDULES = {
    "pruned": Schedule({0: 0.8, 3: 0.8, 6: 0.8}),
    "merged": Schedule(merge={0: 0.2, 3: 0.2, 6: 0.2}),
}
PLAIN, RECORDED = "launched one by one", "CUDA graph"
_REPLAYS = 4  # warm-up, recording, then replays


def measure(step: Step, setting: Setting, results: Results) -> None:
    """A row for each batch size and schedule: small batches are those that wait for launches."""
    for batch in (1, 32):
        for name in SCHEDULES:
            identity = {"model": MODEL, "schedule": name, "batch": batch, "dtype": step.dtype}
            fill_row(results, identity, partial(recorded, name, batch, step.dtype, setting))
            forget()


def recorded(name: str, batch: int, dtype: str, setting: Setting) -> Mapping[str, Any]:
    """Replays against the same graph launched one by one."""
    network, device = NETWORKS[MODEL], torch.device(setting.device)
    model = network.make(setting.tiny).to(device, DTYPES[dtype])
    plain = optimize(model, SCHEDULES[name])
    fast = optimize(model, SCHEDULES[name], mode="reduce-overhead")
    skips = torch._dynamo.utils.counters["inductor"]
    before = skips["cudagraph_skips"]
    nearest = 1.0
    for seed in range(_REPLAYS):
        inputs = _images(network.inputs(batch, setting.tiny), seed, device, DTYPES[dtype])
        near = torch.nn.functional.cosine_similarity(_once(fast, inputs).float(), plain(inputs).float(), dim=-1)
        nearest = min(nearest, float(near.min()))
    calls: dict[str, Callable[[], object]] = {
        PLAIN: partial(plain, inputs),
        RECORDED: partial(_once, fast, inputs),
    }
    timing = interleaved(calls, setting.rounds, device=device, say=say)
    return {
        "skips": skips["cudagraph_skips"] - before,
        "cosine": nearest,
        "milliseconds": {call: 1e3 * timing.of(call).median for call in calls},
        "ratio": timing.ratio(PLAIN, RECORDED).to_dict(),
    }


def _images(like: Tensor, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _once(fast: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """A replay, and its result out of memory that the next one writes."""
    torch.compiler.cudagraph_mark_step_begin()
    return fast(inputs).clone()


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table, a verdict for each row."""
    lines, verdicts = [], []
    for row in rows:
        name = f"{row['model']} {row['schedule']}, batch {row['batch']}"
        if row["failed"]:
            lines.append([name, f"failed: {row['failed']}", *[""] * 4])
            continue
        took = row["milliseconds"]
        words = in_words(PLAIN, RECORDED, row["ratio"])
        is_recorded = "yes" if not row["skips"] else f"no, {row['skips']} skipped"
        lines.append([name, is_recorded, f"{row['cosine']:.5f}", f"{took[PLAIN]:.3f}", f"{took[RECORDED]:.3f}", words])
        verdicts.append(f"CUDA graph of {name}: recorded: {is_recorded}; {words}")
    heads = ("what", "recorded", "least cosine to plain", f"{PLAIN}, ms", f"{RECORDED}, ms", "verdict")
    notes = ["A token at the edge may leave or stay by a rounding, so that a cosine may lie a little below 1."]
    return [Table("CUDA graphs", heads, lines, verdicts, notes)]
