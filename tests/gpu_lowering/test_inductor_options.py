"""What `torch.compile` is told: Inductor's options with the mode's, or the mode alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generated import Config, GeneratedViT
from torch.fx import GraphModule

from bench.gpu.lowering import on_cuda
from passes.pipeline import prepare
from rs_compile import Schedule
from rs_compile.inductor import compile_graph, inductor_options

SMALL = Config(depth=1, width=16)
READS = {"realize_reads_threshold": 2}


def on_gpu() -> GraphModule:
    return on_cuda(GeneratedViT(SMALL), torch.empty(2, 3, 6, 8), torch.float16, Schedule())


def on_cpu(dtype: torch.dtype) -> GraphModule:
    model = GeneratedViT(SMALL)
    return prepare(model.to(dtype), (model.images(2).to(dtype),), {}, lower=True).gm


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        (None, READS),
        ("default", READS),
        ("reduce-overhead", {"triton.cudagraphs": True, **READS}),
        ("max-autotune-no-cudagraphs", {"max_autotune": True, "coordinate_descent_tuning": True, **READS}),
    ],
)
def test_the_modes_options_and_ours(mode: str | None, options: dict[str, Any]) -> None:
    assert inductor_options(on_gpu(), mode) == options
    assert inductor_options(on_cpu(torch.float32), mode) == options


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize(("dtype", "backend"), [(torch.bfloat16, "inductor"), (torch.float32, "aot_eager")])
def test_half_precision_on_cpu_and_other_backends_are_told_the_mode_alone(
    dtype: torch.dtype, backend: str, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda gm, **told: given.append(told) or gm)
    compile_graph(on_cpu(dtype), backend, mode)
    assert given == [{"backend": backend, "mode": mode}]


def test_torch_compile_takes_them_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode and options exclude each other there; an unknown option would be an error."""
    told: list[Any] = []
    compiler = torch._TorchCompileInductorWrapper

    def record(mode: Any, options: Any, *rest: Any, **more: Any) -> Any:
        told.append((mode, options))
        return compiler(mode, options, *rest, **more)

    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", record)
    compile_graph(on_gpu(), "inductor", "reduce-overhead")
    assert told == [(None, {"triton.cudagraphs": True, **READS})]


def test_another_backend_takes_no_options_of_inductors(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda gm, **told: given.append(told) or gm)
    compile_graph(on_gpu(), "aot_eager", None)
    assert given == [{"backend": "aot_eager", "mode": None}]
