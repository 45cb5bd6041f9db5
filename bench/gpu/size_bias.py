"""Size bias of merged tokens: a mask for the efficient kernel, or padded channels for the flash kernel.

By arithmetic the mask should win below about 700 tokens (ARCHITECTURE.md); this decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.document import Table
from bench.gpu.plan import Setting, Step
from bench.gpu.profiled import traced
from bench.gpu.rows import fill_row, fitting, forget, function
from bench.gpu.verdict import by_size, in_words, winner
from bench.tables.results import Results, Row
from passes.sites.sizes import attend_by_channel, attend_by_mask
from rs_compile.commands import DTYPES
from rs_compile.timing import interleaved

MASK, CHANNELS = "mask, efficient", "channels, flash"
HEADS, WIDTH = 6, 64  # DeiT-S
_WAYS = {
    MASK: (attend_by_mask, SDPBackend.EFFICIENT_ATTENTION),
    CHANNELS: (attend_by_channel, SDPBackend.FLASH_ATTENTION),
}


def shapes(tiny: bool) -> list[tuple[int, int]]:
    """(samples, tokens): DeiT-S after a merge, then longer, then UMT after a merge."""
    return [(2, 9), (2, 18)] if tiny else [(64, 178), (64, 402), (64, 577), (32, 800), (32, 1205), (20, 1882)]


def attend(way: str, qkv: Tensor, sizes: Tensor) -> Tensor:
    """Attention as models write it, from the product that makes queries, keys and values to the heads joined again.

    Args:
        qkv: [B, N, 3 * H * d].
        sizes: [B, N] float32.
    """
    B, N, _ = qkv.shape
    q, k, v = qkv.reshape(B, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
    run = _WAYS[way][0]
    mixed = (
        run(q, k, v, None, sizes, None, False)
        if run is attend_by_mask
        else attend_by_channel(q, k, v, sizes, None, False)
    )
    return mixed.transpose(1, 2).reshape(B, N, -1)


def measure(step: Step, setting: Setting, results: Results) -> None:
    """A row for each shape."""
    for samples, tokens in shapes(setting.tiny):

        def make(samples: int = samples, tokens: int = tokens) -> Mapping[str, Any]:
            values, fits = fitting(samples, partial(compared, tokens, step.dtype, setting))
            return {**values, "samples": fits}

        fill_row(results, {"tokens": tokens, "dtype": step.dtype}, make)
        forget()


def compared(tokens: int, dtype: str, setting: Setting, samples: int) -> Mapping[str, Any]:
    """Both ways in turns; how far each is from float64, and which kernel it took."""
    torch.compiler.reset()
    device = torch.device(setting.device)
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(samples, tokens, 3 * HEADS * WIDTH, generator=random).to(device, DTYPES[dtype])
    sizes = torch.randint(1, 9, (samples, tokens), generator=random).float().to(device)
    calls = {way: _call(way, qkv, sizes, setting) for way in _WAYS}
    exact = attend_exactly(qkv[:1], sizes[:1])
    off = {way: float((call()[:1].double() - exact).abs().max()) for way, call in calls.items()}
    timing = interleaved(calls, setting.rounds, device=device)
    return {
        "ratio": timing.ratio(MASK, CHANNELS).to_dict(),
        "milliseconds": {way: 1e3 * timing.of(way).median for way in calls},
        "off": off,
        "kernels": {way: traced(call, device).attention_kernels for way, call in calls.items()},
    }


def attend_exactly(qkv: Tensor, sizes: Tensor) -> Tensor:
    """`attend` in float64, written out."""
    B, N, _ = qkv.shape
    q, k, v = qkv.double().reshape(B, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + sizes.double().log()[:, None, None, :]
    return (logits.softmax(-1) @ v).transpose(1, 2).reshape(B, N, -1)


def _call(way: str, qkv: Tensor, sizes: Tensor, setting: Setting) -> Callable[[], Tensor]:
    run: Callable[[Tensor, Tensor], Tensor] = function(partial(attend, way), setting)

    def call() -> Tensor:
        if not setting.on_cuda:  # the kernels of a CPU are others
            return run(qkv, sizes)
        with sdpa_kernel(_WAYS[way][1]):
            return run(qkv, sizes)

    return call


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table and one verdict."""
    lines, better = [], []
    for row in rows:
        if row["failed"]:
            lines.append([str(row["tokens"]), "", f"failed: {row['failed']}", *[""] * 4])
            continue
        took, off = row["milliseconds"], row["off"]
        better.append((row["tokens"], winner(MASK, CHANNELS, row["ratio"])))
        lines.append(
            [
                str(row["tokens"]),
                str(row["samples"]),
                *(f"{took[way]:.3f}" for way in _WAYS),
                *(f"{off[way]:.1e}" for way in _WAYS),
                in_words(MASK, CHANNELS, row["ratio"]),
            ]
        )
    verdicts = [f"size bias: {by_size(MASK, CHANNELS, better, 'tokens')} (expected: the mask below about 700)"]
    heads = ("tokens", "samples", f"{MASK}, ms", f"{CHANNELS}, ms", "mask: off by", "channels: off by", "verdict")
    notes = ["6 heads of 64 channels, from the joint product of queries, keys and values to the joined heads."]
    return [Table("Size bias: mask or channels", heads, lines, verdicts if better else (), notes)]
