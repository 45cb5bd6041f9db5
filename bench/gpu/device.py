"""What the device is, and the most that it was seen to do: products of matrices, and moving memory."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu.document import Table
from bench.gpu.plan import Setting, Step
from bench.gpu.rows import fill_row
from bench.tables.results import Results, Row
from rs_compile.timing import interleaved

SIDE, TINY_SIDE = 8192, 256


def measure(step: Step, setting: Setting, results: Results) -> None:
    """Two rows: what it is, what it does."""
    device = torch.device(setting.device)
    fill_row(results, {"row": "name"}, lambda: what(device))
    side = TINY_SIDE if setting.tiny else SIDE
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        fill_row(results, {"row": name}, partial(speed, side, dtype, device, setting.rounds))


def what(device: torch.device) -> Mapping[str, Any]:
    """Name, memory and versions."""
    if device.type != "cuda":
        return {"is": f"{device}, {torch.get_num_threads()} threads"}
    of = torch.cuda.get_device_properties(device)
    text = f"{of.name}, sm_{of.major}{of.minor}, {of.multi_processor_count} SMs, {of.total_memory / 2**30:.0f} GiB"
    free, _ = torch.cuda.mem_get_info(device)
    return {"is": f"{text}, {free / 2**30:.0f} free, CUDA {torch.version.cuda}{_driver()}"}


def _driver() -> str:
    if (program := shutil.which("nvidia-smi")) is None:
        return ""
    asked = [program, "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    return f", driver, clock, power: {done.stdout.splitlines()[0]}" if done.returncode == 0 and done.stdout else ""


def speed(side: int, dtype: torch.dtype, device: torch.device, rounds: int) -> Mapping[str, Any]:
    """Multiply-accumulates a second of a square product, and bytes a second of a copy (read and written)."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    calls = {"product": lambda: a @ a, "copy": lambda: a.clone()}
    timing = interleaved(calls, rounds, device=device)
    return {
        "macs_per_second": side**3 / timing.of("product").median,
        "bytes_per_second": 2 * a.nbytes / timing.of("copy").median,
    }


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table."""
    lines = []
    for row in rows:
        if "is" in row:
            lines.append(["device", row["is"]])
        elif "macs_per_second" in row:
            product = f"{2e-12 * row['macs_per_second']:.3g} TFLOP/s in products"
            lines.append([row["row"], f"{product}, {1e-9 * row['bytes_per_second']:.3g} GB/s in copies"])
    return [Table("Device", ("what", "seen"), lines)]
