"""Which kernels a call launches, read from the profiler's trace."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.journal import CannotRun
from rs_compile.timing import wait_for

_ATTENTION = re.compile(r"flash|fmha|scaled_dot_product|sdpa|attention", re.IGNORECASE)
_FUSED = re.compile(r"aten::_scaled_dot_product_(flash|efficient|cudnn|fused)_")


class Trace:
    """What the profiler saw of one call.

    Args:
        events: of the trace, those with a duration.
        device: where the call ran.
    """

    def __init__(self, events: Sequence[dict[str, Any]], device: torch.device) -> None:
        self._events, self._device = sorted(events, key=lambda e: float(e["ts"])), device

    @property
    def kernels(self) -> list[str]:
        """Kernels in order: on a CUDA device those that it ran, without copies; on a CPU the outermost ops."""
        if self._device.type == "cuda":
            return [event["name"] for event in self._events if event.get("cat") == "kernel"]
        found, end = [], 0.0
        for event in self._events:
            if event.get("cat") == "cpu_op" and event["name"].startswith("aten::") and float(event["ts"]) >= end:
                found.append(event["name"].removeprefix("aten::"))
                end = float(event["ts"]) + float(event["dur"])
        return found

    @property
    def attentions(self) -> list[str]:
        """The kernel of each fused attention, in order, named as in a report: flash, efficient, cudnn."""
        found = [_FUSED.match(str(event["name"])) for event in self._events if event.get("cat") == "cpu_op"]
        return [match.group(1) for match in found if match is not None]

    @property
    def attention_kernels(self) -> list[str]:
        """Kernels of the device whose names say attention, each once."""
        return sorted({kernel for kernel in self.kernels if kind(kernel) == "attention"})


def traced(call: Callable[[], object], device: torch.device) -> Trace:
    """Profiles one call, which should have run before.

    Raises:
        CannotRun: on CUDA, where the profiler saw no kernel: it may not be permitted to.
    """
    wait = wait_for(device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    for _ in range(2):  # the first starts CUPTI, and may miss kernels
        wait()
        with profile(activities=activities) as record:
            call()
            wait()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        record.export_chrome_trace(str(file))
        events = json.loads(file.read_text(errors="replace"))["traceEvents"]
    trace = Trace([event for event in events if event.get("ph") == "X"], device)
    if device.type == "cuda" and not trace.kernels:
        raise CannotRun(
            "the profiler saw no kernels: it may need CUPTI (pip install nvidia-cuda-cupti), or permission to profile "
            "(NVreg_RestrictProfilingToAdminUsers=0, or run as root)"
        )
    return trace


def kind(kernel: str) -> str:
    """What a kernel does, by its name: attention, product, generated (by Inductor) or other."""
    if kernel.startswith("triton_"):
        return "generated"
    if _ATTENTION.search(kernel):
        return "attention"
    if re.search(r"gemm|cutlass|cublas|nvjet|splitk|mm$|linear|matmul", kernel, re.IGNORECASE):
        return "product"
    return "other"


def by_attention(kernels: Sequence[str]) -> list[list[str]]:
    """Kernels from one attention to the next: each part ends with an attention, the last is what follows.

    An attention may be several kernels in a row.
    """
    parts: list[list[str]] = [[]]
    for i, kernel in enumerate(kernels):
        parts[-1].append(kernel)
        ends = kind(kernel) == "attention"
        if ends and not (i + 1 < len(kernels) and kind(kernels[i + 1]) == "attention"):
            parts.append([])
    return parts
