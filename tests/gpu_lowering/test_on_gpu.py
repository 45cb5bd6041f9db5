"""The real thing, where there is a GPU: equal to eager, flash in the profile, a CUDA graph that replays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import cut
from generated import Config, GeneratedViT
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from rs_compile import Schedule, Stream, optimize

pytestmark = [pytest.mark.cuda, pytest.mark.inductor]

SCHEDULES = [Schedule(keep={0: 0.8, 1: 0.8, 2: 0.8}), Schedule(merge={0: 0.1, 1: 0.1}, by=Stream(size_bias=True))]


def model(side: int = 14, heads: int = 6) -> nn.Module:
    return GeneratedViT(Config(depth=4, width=384, heads=heads, grid=(side, side), prefix=1)).cuda()


def images(side: int = 14, batch: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 2 * side, 2 * side, generator=torch.Generator().manual_seed(seed)).cuda()


def cnn() -> nn.Module:
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10).eval().cuda()


# pruned and merged tokens at 197 and 577, of which the latter take topk; lines and cells of a CNN at 224 and 384 pixels
CASES = [
    *(pytest.param(model, side, schedule) for schedule in SCHEDULES for side in (14, 24)),
    *(pytest.param(lambda side: cnn(), 8 * side, cut(mode)) for mode in ("line", "token") for side in (14, 24)),
]


@pytest.mark.parametrize(("make", "side", "schedule"), CASES)
@torch.no_grad()
def test_compiled_is_eager(make: Callable[[int], nn.Module], side: int, schedule: Schedule) -> None:
    """In float32, where rounding does not decide which token leaves."""
    torch.compiler.reset()
    dense = make(side)
    got = optimize(dense, schedule)(images(side))
    torch.testing.assert_close(got, optimize(dense, schedule, backend="eager")(images(side)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@torch.no_grad()
def test_the_same_tokens_stay_as_on_the_cpu(schedule: Schedule) -> None:
    """On a GPU matching counts and selecting sorts, on a CPU the other way round."""
    dense = model().double()
    x = images().double()
    got = optimize(dense, schedule, backend="eager")(x)
    torch.testing.assert_close(got.cpu(), optimize(dense.cpu(), schedule, backend="eager")(x.cpu()))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("heads", [6, 32])
@torch.no_grad()
def test_the_profile_shows_flash(schedule: Schedule, heads: int) -> None:
    torch.compiler.reset()
    dense, x = model(heads=heads).half(), images().half()
    fast = optimize(dense, schedule)
    fast(x)
    assert [row.attention_kernel for row in fast.report().blocks] == ["flash"] * 4
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        fast(x)
        torch.cuda.synchronize()
    names = {event.key: event.count for event in trace.key_averages()}
    assert names["aten::_scaled_dot_product_flash_attention"] == 4
    assert sum(count for name, count in names.items() if "flash_fwd" in name) >= 4
    assert not [name for name in names if "softmax" in name]


@pytest.mark.parametrize(("make", "side", "schedule"), CASES)
@torch.no_grad()
def test_a_cuda_graph_replays(make: Callable[[int], nn.Module], side: int, schedule: Schedule) -> None:
    torch.compiler.reset()
    dense = make(side)
    fast, plain = optimize(dense, schedule, mode="reduce-overhead"), optimize(dense, schedule, backend="eager")
    before = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    for seed in range(4):  # warm-up, capture, replays
        x = images(side, seed=seed)
        torch.testing.assert_close(fast(x).clone(), plain(x), atol=1e-3, rtol=1e-3)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_under_autocast(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    dense, x = model(), images()
    fast: Any = optimize(dense, SCHEDULES[0])
    with torch.autocast("cuda", dtype):
        got, wanted = fast(x), optimize(dense, SCHEDULES[0], backend="eager")(x)
    assert fast.report().blocks[0].attention_kernel != "math"
    # a token at the edge may leave or stay by a rounding
    assert torch.nn.functional.cosine_similarity(got.float(), wanted.float()).min() > 0.99


def test_training_takes_the_flash_backward() -> None:
    torch.compiler.reset()
    dense, x = model().bfloat16().train(), images().bfloat16()
    fast = optimize(dense, SCHEDULES[0])
    fast(x).float().sum().backward()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        fast(x).float().sum().backward()
    names = {event.key: event.count for event in trace.key_averages()}
    assert names["aten::_scaled_dot_product_flash_attention_backward"] == 4
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in dense.parameters())
