"""Every generated kernel compiles to machine code for an A100 and an H100, without either."""

from __future__ import annotations

import pytest
from cases import SITES, cnn, transformer
from fake_gpu import AMPERE, HOPPER, Capability, generate
from torch.fx import GraphModule
from triton_kernels import compiled, sources

from rs_compile import GridPrune, Schedule

pytestmark = [pytest.mark.inductor, pytest.mark.slow]


def graph(case: str) -> GraphModule:
    if case in ("line", "token"):
        return cnn(Schedule(grid=dict.fromkeys(SITES, GridPrune(rows=2, columns=2, mode=case))))
    if case == "merged":
        return transformer(197, Schedule(merge=dict.fromkeys(SITES, 0.1)))
    return transformer(int(case), Schedule(keep=dict.fromkeys(SITES, 0.95)))


@pytest.mark.parametrize(("capability", "target"), [(AMPERE, "sm_80"), (HOPPER, "sm_90a")])
@pytest.mark.parametrize("case", ["197", "577", "merged", "line", "token"])
def test_every_kernel_compiles(case: str, capability: Capability, target: str) -> None:
    generated = generate(graph(case), 64, capability)
    wanted = set(sources(generated))
    assert wanted and wanted == {launch for launch in generated.launches if launch.startswith("triton_")}
    binaries = list(compiled(generated, capability))
    assert {binary.name for binary in binaries} == wanted
    assert all(binary.code > 0 and binary.target == target for binary in binaries)
