"""CNNs pruned by the compiler against the same models pruned by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import oracle
import oracle_cnn
import pytest
import timm
import torch
import torchvision
from oracle_cnn import Cut, Parts
from schedules import handle_of
from torch import Tensor, nn

import rs_compile
from passes.sites.grid_prune import GridPrune
from rs_compile import Schedule

pytestmark = pytest.mark.usefixtures("captured_once")

TOLERANCE = 2e-4


def tv(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(getattr(torchvision.models, name), num_classes=5, **options)


def tm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=5, **options)


def small(block: str, **options: Any) -> Callable[[], nn.Module]:
    """torchvision's ResNet with one or two blocks a stage."""
    resnet = torchvision.models.resnet
    return partial(resnet.ResNet, getattr(resnet, block), [2, 1, 2, 1], num_classes=5, **options)


def small_convnext() -> nn.Module:
    config = torchvision.models.convnext.CNBlockConfig
    sizes = ((16, 24, 2), (24, 32, 1), (32, None, 2))
    return torchvision.models.ConvNeXt([config(*size) for size in sizes], num_classes=5)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Parts]]] = {
    "torchvision basic": (small("BasicBlock"), oracle_cnn.torchvision_resnet),
    "torchvision bottleneck": (small("Bottleneck"), oracle_cnn.torchvision_resnet),
    "torchvision resnext": (small("Bottleneck", groups=4, width_per_group=8), oracle_cnn.torchvision_resnet),
    "timm basic": (tm("resnet18", layers=(1, 2, 1, 1)), oracle_cnn.timm_resnet),
    "timm bottleneck": (tm("resnet26d", layers=(1, 1, 1, 1)), oracle_cnn.timm_resnet),
    "timm resnext": (tm("resnext50_32x4d", layers=(1, 2, 1, 1)), oracle_cnn.timm_resnet),
    "torchvision regnet y": (tv("regnet_y_400mf"), oracle_cnn.torchvision_regnet),
    "timm regnet x": (tm("regnetx_002"), oracle_cnn.timm_regnet),
    "torchvision convnext": (
        small_convnext,
        oracle_cnn.torchvision_convnext,
    ),
    "timm convnext": (tm("convnext_atto", depths=(1, 2, 2, 1), dims=(16, 24, 32, 40)), oracle_cnn.timm_convnext),
}  # fmt: skip
CUTS = {
    "line": {0: Cut(3, 4), 1: Cut(1, 2)},
    "token": {0: Cut(4, 3, "token"), 1: Cut(2, 1, "token")},
    "both": {0: Cut(3, 4), 1: Cut(1, 2, "token")},
    "line, rows first, sum": {0: Cut(4, 4, order="rows-first", against="sum"), 2: Cut(1, 1, against="sum")},
}


def images(batch: int = 2, side: int = 80) -> Tensor:
    return torch.randn(batch, 3, side, side - 16, generator=torch.Generator().manual_seed(3))


def schedule(cuts: Mapping[int, Cut]) -> Schedule:
    return Schedule(grid={i: GridPrune(**vars(cut)) for i, cut in cuts.items()})


def optimized(model: nn.Module, cuts: Mapping[int, Cut], **options: Any) -> rs_compile.OptimizedModel:
    return handle_of(model, schedule(cuts), **options)


@cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return oracle_cnn.lively(MODELS[name][0](), images())


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, "both") for name in MODELS]
    + [("torchvision basic", how) for how in CUTS if how != "both"]
    + [("timm convnext", "token")],
)
@torch.no_grad()
def test_pruned_equals_pruned_by_hand(name: str, how: str) -> None:
    (_, take_apart), cuts, model = MODELS[name], CUTS[how], model_of(name)
    wanted = oracle_cnn.walk(take_apart(model), images(), cuts)
    assert wanted.margin > 1e-6, "the scores are too near to tell"
    fast = optimized(model, cuts)
    oracle.assert_close(fast(images()), wanted.output, TOLERANCE, name)
    assert oracle.max_difference(wanted.output, model(images())) > 100 * TOLERANCE, "the cut changes nothing"
    grids = [tuple(stage.shape[2:]) for stage in wanted.stages]
    assert [row.grid_in for row in fast.report().stages] == grids
    left = [(h - cuts[i].rows, w - cuts[i].columns) if i in cuts else (h, w) for i, (h, w) in enumerate(grids)]
    assert [row.grid_out for row in fast.report().stages] == left


@pytest.mark.parametrize(("name", "mode"), [("torchvision bottleneck", "line"), ("timm convnext", "token")])
def test_training(name: str, mode: str) -> None:
    """Outputs, gradients, and the batch norm statistics that the model's own buffers hold afterwards."""
    build, take_apart = MODELS[name]
    torch.manual_seed(0)
    model = oracle_cnn.lively(build(), images(4)).double().train()
    by_hand = copy.deepcopy(model)
    cuts = {0: Cut(3, 4, mode), 1: Cut(2, 1, mode)}
    fast = optimized(model, cuts)
    x = images(4).double()
    for _ in range(2):
        got, wanted = fast(x), oracle_cnn.walk(take_apart(by_hand), x, cuts)
        assert wanted.margin > 1e-6
        oracle.assert_close(got, wanted.output, 1e-9, name)
        for module, out in ((model, got), (by_hand, wanted.output)):
            module.zero_grad()
            (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum().backward()
    for (parameter, p), q in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), parameter
        if p.grad is not None and q.grad is not None:
            scale = max(1.0, q.grad.abs().max().item())
            assert oracle.max_difference(p.grad, q.grad) <= 1e-8 * scale, parameter
    for (buffer, b), c in zip(model.named_buffers(), by_hand.buffers(), strict=True):
        assert oracle.max_difference(b, c) <= 1e-9, buffer
    assert fast.state_dict().keys() == by_hand.state_dict().keys()


@pytest.mark.parametrize("name", ["torchvision basic", "timm convnext"])
@torch.no_grad()
def test_keeping_everything_is_bit_equal(name: str) -> None:
    model = model_of(name)
    nothing = {0: Cut(0, 0), 1: Cut(0, 0, "token")}
    assert torch.equal(optimized(model, nothing)(images()), model(images()))
    forced = optimized(model, nothing, force_insert=True)
    assert any(
        n.target is torch.ops.aten.index.Tensor for n in (forced(images()), forced.graph_module())[1].graph.nodes
    )
    oracle.assert_close(forced(images()), model(images()), 1e-5, name)


@pytest.mark.parametrize("mode", ["line", "token"])
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(mode: str) -> None:
    model = model_of("torchvision basic")
    fast = optimized(model, {0: Cut(3, 4, mode), 1: Cut(2, 1, mode)})
    x = images(4)
    together = fast(x)
    for i in range(4):
        oracle.assert_close(fast(x[i : i + 1]), together[i : i + 1], TOLERANCE, f"sample {i}")
    oracle.assert_close(fast(x.flip(0)).flip(0), together, TOLERANCE, "reversed")


@pytest.mark.parametrize(
    ("name", "mode", "before", "after"), [("resnet34", "line", 3.671, 2.469), ("resnet50", "token", 4.112, 2.721)]
)
def test_gflops_of_the_paper(name: str, mode: str, before: float, after: float) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)().eval()
    cuts = {0: Cut(8, 8, mode), 1: Cut(4, 4, mode)}
    report = rs_compile.plan(model, schedule(cuts), torch.empty(1, 3, 224, 224, device="meta"))
    assert (round(report.flops_dense / 1e9, 3), round(report.flops / 1e9, 3)) == (before, after)
    assert [row.grid_out for row in report.stages] == [(48, 48), (20, 20), (10, 10), (5, 5)]


@torch.no_grad()
def test_channels_last() -> None:
    model = oracle_cnn.lively(MODELS["torchvision basic"][0](), images()).to(memory_format=torch.channels_last)
    cuts = {0: Cut(3, 4), 1: Cut(1, 2, "token")}
    x = images().to(memory_format=torch.channels_last)
    wanted = oracle_cnn.walk(oracle_cnn.torchvision_resnet(model), x, cuts)
    fast = optimized(model, cuts)
    oracle.assert_close(fast(x), wanted.output, TOLERANCE)
    convolutions = fast.graph_module().graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    maps = [n.meta["val"] for n in convolutions]
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in maps), "the gather lost the memory format"


@pytest.mark.inductor
@torch.no_grad()
def test_through_inductor() -> None:
    torch.manual_seed(0)
    model = oracle_cnn.lively(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]), images())
    cuts = {0: Cut(3, 4), 1: Cut(1, 2, "token")}
    wanted = oracle_cnn.walk(oracle_cnn.torchvision_resnet(model), images(), cuts)
    assert wanted.margin > 1e-5
    oracle.assert_close(optimized(model, cuts, backend="inductor")(images()), wanted.output, 1e-3)
