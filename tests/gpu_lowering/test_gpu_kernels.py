"""Every generated kernel compiles to machine code for an A100 and an H100, without either."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import cnn, cut, kept, merged, transformer
from torch.fx import GraphModule
from triton_kernels import compiled, sources

from bench.gpu.lowering import AMPERE, HOPPER, Capability, generate

pytestmark = [pytest.mark.inductor, pytest.mark.slow]

GRAPHS: dict[str, Callable[[int, int], GraphModule]] = {
    "pruned": lambda tokens, samples: transformer(tokens, kept(), samples),
    "merged": lambda tokens, samples: transformer(tokens, merged(), samples),
    "lines": lambda tokens, samples: cnn(tokens, cut("line"), samples),
    "cells": lambda tokens, samples: cnn(tokens, cut("token"), samples),
}


@pytest.mark.parametrize(("capability", "target"), [(AMPERE, "sm_80"), (HOPPER, "sm_90a")])
@pytest.mark.parametrize("tokens", [197, 577])
@pytest.mark.parametrize("samples", [64, 1024])
@pytest.mark.parametrize("case", GRAPHS)
def test_every_kernel_compiles(case: str, samples: int, tokens: int, capability: Capability, target: str) -> None:
    generated = generate(GRAPHS[case](tokens, samples), samples, capability)
    wanted = set(sources(generated))
    assert wanted and wanted == {launch for launch in generated.launches if launch.startswith("triton_")}
    binaries = list(compiled(generated, capability))
    assert {binary.name for binary in binaries} == wanted
    assert all(binary.code > 0 and binary.target == target for binary in binaries)
