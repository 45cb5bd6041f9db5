"""The steps, the most telling first; no more than their names, so that `--help` waits for no import of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial


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
        subjects: the models, where steps differ in them.
        dtype: of the model.
        needs_cuda: why it cannot run on a CPU; "" where it can.
    """

    name: str
    title: str
    module: str
    limit: float
    subjects: tuple[str, ...] = ()
    dtype: str = "float16"
    needs_cuda: str = ""


def _speed(name: str, limit: float, *subjects: str, dtype: str = "float16", module: str = "throughput") -> Step:
    title = f"throughput of {', '.join(subjects)} in {dtype}"
    return Step(f"{name}-{dtype}", title, f"bench.gpu.{module}", limit, subjects, dtype)


_resnets = partial(_speed, "resnets", 500, "ResNet-50", "ResNet-34", module="table6_speed")
_ALL = (
    Step("device", "what the GPU is and does at best", "bench.gpu.device", 60),
    _speed("deit-s", 240, "DeiT-S"),
    Step("attention", "which attention kernel really runs", "bench.gpu.attention", 180),
    _speed("umt-b", 240, "UMT-B"),
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
    _speed("deit-b-t", 400, "DeiT-B", "DeiT-T"),
    _speed("umt-l", 300, "UMT-L"),
    _resnets(),
    _speed("transformers", 900, "DeiT-S", "UMT-B", "DeiT-B", "DeiT-T", "UMT-L", dtype="bfloat16"),
    _resnets(dtype="bfloat16"),
)
STEPS = {step.name: step for step in _ALL}
# of several models, which are made by the same code, the first
TINY_STEPS = {name: replace(step, limit=300, subjects=step.subjects[:1]) for name, step in STEPS.items()}
