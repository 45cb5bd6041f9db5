"""The steps, the most telling first; no more than their names, so that `--help` waits for no import of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Args:
        device: a CUDA device; "cpu" with `tiny`.
        tiny: small stand-ins, whose numbers mean nothing.
    """

    device: str
    tiny: bool

    @property
    def on_cuda(self) -> bool:
        """Whether there are a GPU's kernels to see."""
        return self.device.startswith("cuda")

    @property
    def backend(self) -> str:
        """torch.compile's: on a CPU nothing is compiled, which took a minute a graph."""
        return "inductor" if self.on_cuda else "eager"

    @property
    def rounds(self) -> int:
        """Of timing."""
        return 2 if self.tiny else 5


@dataclass(frozen=True)
class Step:
    """One part of the plan, a process of its own.

    Args:
        name: in options, files and results.
        title: in words.
        module: whose `measure(step, setting, results)` does it and whose `tables(rows)` shows it.
        limit: seconds it may take.
        subject: the model, where steps differ in it.
        dtype: of the model.
        needs_cuda: why it cannot run on a CPU; "" where it can.
    """

    name: str
    title: str
    module: str
    limit: float
    subject: str = ""
    dtype: str = "float16"
    needs_cuda: str = ""


def _speed(subject: str, dtype: str, limit: float, module: str = "throughput") -> Step:
    name = f"{subject.lower()}-{dtype}"
    return Step(name, f"throughput of {subject} in {dtype}", f"bench.gpu.{module}", limit, subject, dtype)


_TIMES = "table6_speed"
_ALL = (
    Step("device", "what the GPU is and does at best", "bench.gpu.device", 60),
    _speed("DeiT-S", "float16", 240),
    Step("attention", "which attention kernel really runs", "bench.gpu.attention", 180),
    _speed("UMT-B", "float16", 240),
    Step("launches", "kernels a site, beside the counts that the tests predict", "bench.gpu.launches", 240),
    Step(
        "tests",
        "the tests marked `cuda`",
        "bench.gpu.gpu_tests",
        300,
        needs_cuda="tests marked `cuda` compare a GPU's results and look at its kernels",
    ),
    Step(
        "graphs",
        "CUDA graphs under reduce-overhead",
        "bench.gpu.graphs",
        150,
        needs_cuda="CUDA graphs are CUDA's: on a CPU reduce-overhead is the default mode",
    ),
    Step("size-bias", "size bias: a mask or padded channels", "bench.gpu.size_bias", 150),
    Step("selection", "selecting: sorts, topk or comparing", "bench.gpu.selection", 180),
    Step("determinism", "what deterministic scatter_add costs", "bench.gpu.determinism", 90),
    Step("compile-time", "first calls, cold and warm", "bench.gpu.first_calls", 360),
    _speed("DeiT-B", "float16", 240),
    _speed("DeiT-T", "float16", 240),
    _speed("UMT-L", "float16", 300),
    _speed("ResNet-50", "float16", 240, _TIMES),
    _speed("ResNet-34", "float16", 240, _TIMES),
    *(_speed(name, "bfloat16", 240) for name in ("DeiT-S", "UMT-B", "DeiT-T", "DeiT-B", "UMT-L")),
    *(_speed(name, "bfloat16", 240, _TIMES) for name in ("ResNet-50", "ResNet-34")),
)
STEPS = {step.name: step for step in _ALL}
TINY_STEPS = {name: replace(step, limit=120) for name, step in STEPS.items()}
