"""What stays in memory after a capture, and how much a forward pass takes at its peak."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx.experimental import proxy_tensor

import passes.capture.capture
from bench.memory import peak_bytes
from rs_compile import GridPrune, OptimizedModel, Schedule, optimize

SCHEDULE = Schedule({0: 0.7, 2: 0.7})
MERGING = Schedule({2: 0.7}, merge={0: 4})


def vit(**options: Any) -> nn.Module:
    return timm.create_model("test_vit", img_size=64, num_classes=10, **options).eval()


def fakes() -> list[FakeTensor]:
    # torch.export's own table of its last graph, which the next export empties
    proxy_tensor._FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT.clear()
    gc.collect()
    return [o for o in gc.get_objects() if type(o) is FakeTensor]


def values(handle: OptimizedModel) -> set[int]:
    leaves = torch.utils._pytree.tree_leaves([n.meta.get("val") for n in handle.graph_module().graph.nodes])
    return {id(v) for v in leaves if isinstance(v, Tensor)}


@pytest.mark.parametrize(
    ("name", "schedule", "options"),
    [
        ("test_vit", SCHEDULE, {}),
        ("test_vit", MERGING, {}),
        ("test_vit", SCHEDULE, {"guard": "measure"}),
        ("test_resnet", Schedule(grid={0: GridPrune(4, 4)}), {}),
    ],
)
def test_nothing_of_a_capture_stays(
    monkeypatch: pytest.MonkeyPatch, name: str, schedule: Schedule, options: dict[str, Any]
) -> None:
    programs: list[weakref.ref[Any]] = []
    export = passes.capture.capture.export

    def noting(*args: Any, **kwargs: Any) -> Any:
        program = export(*args, **kwargs)
        programs.append(weakref.ref(program))
        return program

    monkeypatch.setattr(passes.capture.capture, "export", noting)
    before = {id(f) for f in fakes()}
    model = timm.create_model(name, num_classes=10, **({"img_size": 64} if name == "test_vit" else {})).eval()
    x = torch.randn(2, 3, 64, 64)
    given = weakref.ref(x)
    handle = optimize(model, schedule, backend="eager", **options)
    out = weakref.ref(handle(x))
    del x
    left = [f for f in fakes() if id(f) not in before]
    assert given() is None and out() is None
    assert len(programs) == 1 and programs[0]() is None
    other = [f for f in left if id(f) not in values(handle)]
    if not options:  # a guard keeps the graphs of both sides
        assert len(other) <= 1 and all(f.shape[1:] == (3, 64, 64) for f in other)  # the batch symbol's own input
    assert 0 < len(left) < 600
    del handle, left, other
    # torch's cache of fake results keeps the batch symbol, and that its input, of no memory
    assert all(f.shape[1:] == (3, 64, 64) for f in fakes() if id(f) not in before)


def test_a_graphs_values_are_fake_and_its_weights_the_models() -> None:
    model = vit(dynamic_img_size=True)
    handle = optimize(model, SCHEDULE, backend="eager")
    graphs = []
    for size in (64, 96):
        handle(torch.randn(2, 3, size, size))
        graphs.append(handle.graph_module())
    assert graphs[0] is not graphs[1]
    own = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
    for gm in graphs:
        held = [*gm.parameters(), *gm.buffers()]
        assert len(held) == len(list(model.parameters()))
        assert {t.data_ptr() for t in held} <= own and {id(p) for p in held} == {id(p) for p in model.parameters()}
        in_meta = torch.utils._pytree.tree_leaves([list(n.meta.values()) for n in gm.graph.nodes])
        assert not [v for v in in_meta if isinstance(v, Tensor) and not isinstance(v, FakeTensor)]


def test_the_peak_is_counted_to_the_byte() -> None:
    def two_of_three_at_once() -> None:
        first, second = torch.empty(1000), torch.empty(2000)
        del first
        assert torch.empty(500).numel() + second.numel() == 2500

    assert peak_bytes(two_of_three_at_once) == 4 * 3000
    assert peak_bytes(lambda: None) == 0


@torch.no_grad()
def test_pruning_does_not_raise_the_peak() -> None:
    model = timm.create_model("test_vit", img_size=160, num_classes=10).eval()
    x = torch.randn(4, 3, 160, 160)
    dense, pruned = (optimize(model, s, backend="eager") for s in (Schedule(), Schedule({0: 0.3})))
    dense(x), pruned(x)
    # block 0 sees every token in both: what comes behind must not take more, nor must what was kept for it
    assert peak_bytes(lambda: pruned(x)) <= peak_bytes(lambda: dense(x))
