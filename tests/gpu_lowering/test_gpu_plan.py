"""What `python -m bench gpu` compiles on a GPU: its small graphs are lowered and every kernel compiled, without one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor, float16
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from triton_kernels import compiled, nameless, sources

from bench.gpu import attention, determinism, graphs, launches, selection, size_bias, throughput
from bench.gpu.lowering import HOPPER, generate, on_cuda
from bench.tables.table6 import METHODS, resnet
from bench.throughput.networks import NETWORKS
from passes.device.name_flash import NameFlash
from rs_compile import Schedule

pytestmark = [pytest.mark.inductor, pytest.mark.slow]

Graph = tuple[GraphModule, int]  # and the samples of a call


def of_functions(run: Callable[..., Tensor], *shapes: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> GraphModule:
    """A function of tensors as a graph on fake CUDA tensors, flash named."""
    with FakeTensorMode():
        given = [torch.empty(shape, device="cuda", dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        gm = make_fx(run, pre_dispatch=True)(*given)
    return NameFlash()(gm).gm


def speed(name: str) -> dict[str, Callable[[], Graph]]:
    """The ways of a throughput step, but for those that run uncompiled."""
    of = throughput.subject(name, tiny=True)
    ways = [way for way in throughput.ways(of) if way.schedule is not None and "backend" not in way.options]
    return {f"{name}, {way.name}": partial(rewritten, of.make(False, None), of.shape, way.schedule) for way in ways}


def rewritten(model: torch.nn.Module, shape: tuple[int, ...], schedule: Schedule | None, samples: int = 4) -> Graph:
    return on_cuda(model, torch.empty(samples, *shape), float16, schedule or Schedule()), samples


def of_site(case: launches.Case, tiny: bool) -> Graph:
    return rewritten(launches.network(case, tiny), (3, case.side, case.side), case.way.schedule, case.batch)


def of_network(name: str, schedule: Schedule | None) -> Graph:
    network = NETWORKS[name]
    return rewritten(network.make(True), tuple(network.inputs(1, True).shape[1:]), schedule, samples=2)


def of_resnet(schedule: Schedule | None) -> Graph:
    of = resnet("ResNet-50", quick=True)
    return rewritten(of.make(False, None), of.shape, schedule)


def micro() -> dict[str, Callable[[], Graph]]:
    """The micro-benchmarks. A mask makes SDPA choose when it is lowered, for which a driver must be there."""
    found: dict[str, Callable[[], Graph]] = {}
    half, single = torch.float16, torch.float32
    (b, n), *_ = size_bias.shapes(tiny=True)
    wide = 3 * size_bias.HEADS * size_bias.WIDTH
    channels = partial(of_functions, partial(size_bias.attend, size_bias.CHANNELS), (b, n, wide), (b, n))
    found["size bias"] = lambda: (channels(dtypes=(half, single)), b)
    for how in selection.WAYS:
        for samples, tokens in selection.shapes(tiny=True):
            run = partial(selection.chosen, how, int(selection.KEEP * tokens))
            select = partial(of_functions, run, (samples, tokens), dtypes=(single,))
            found[f"{how}, {tokens} tokens"] = lambda make=select, samples=samples: (make(), samples)
    for samples, tokens, r in determinism.shapes(tiny=True):
        merge = partial(
            of_functions, partial(determinism.merged, r), (samples, tokens, determinism.WIDTH), dtypes=(half,)
        )
        found["merging"] = lambda make=merge, samples=samples: (make(), samples)
    return found


GRAPHS: dict[str, Callable[[], Graph]] = {
    **speed("DeiT-S"),
    **speed("UMT-B"),
    **{f"{name} of DeiT-S": partial(of_network, "DeiT-S", schedule) for name, schedule in graphs.SCHEDULES.items()},
    **{
        f"kernel of {c.model}, {c.way.name}": partial(of_network, c.model, c.way.schedule)
        for c in attention.cases(tiny=True)
    },
    **{f"ResNet, {name}": partial(of_resnet, method.schedule) for name, method in METHODS.items()},
    **{f"launches, {case.name}": partial(of_site, case, True) for case in launches.cases(tiny=True)},
    **micro(),
}


COMPILED: set[str] = set()  # kernels of the graphs before, many of which are the same


@pytest.mark.parametrize("name", GRAPHS)
def test_every_kernel_of_the_tiny_plan_compiles(name: str) -> None:
    gm, samples = GRAPHS[name]()
    generated = generate(gm, samples)
    kernels = sources(generated)
    assert kernels and kernels.keys() == {launch for launch in generated.launches if launch.startswith("triton_")}
    new = {name: nameless(name, source) for name, source in kernels.items()}
    new = {name: kernel for name, kernel in new.items() if kernel not in COMPILED}
    assert {binary.name for binary in compiled(generated, HOPPER, COMPILED) if binary.code > 0} == set(new)
    COMPILED.update(new.values())


SITES = {case.name: case for case in launches.cases(tiny=False)}


@cache
def launched(name: str) -> int:
    return len(generate(*of_site(SITES[name], False)).launches)


@pytest.mark.parametrize("name", [name for name, case in SITES.items() if case.predicted])
def test_launches_are_as_predicted(name: str) -> None:
    """The counts that are shown beside the profiler's."""
    assert launched(name) - launched(SITES[name].dense) == SITES[name].predicted
