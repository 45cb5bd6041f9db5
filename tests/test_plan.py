"""`plan`: the report of `optimize` without a forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from bench.models.umt import Size, VisionEncoder
from rs_compile import CompileError, InputError, MeanAttention, Schedule, optimize, plan
from rs_compile.planning import plans

SCHEDULE = Schedule({0: 0.5})


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return VisionEncoder(Size(16, 2, 2), frames=2, side=8, patch=2).eval()


CLIPS = torch.randn(2, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def test_it_is_the_report_of_optimize_and_runs_no_more_than_two_samples(model: nn.Module) -> None:
    called: list[Tensor] = []
    hook = model.get_submodule("encoder").register_forward_hook(lambda _m, _i, out: called.append(out))
    report = plan(model, SCHEDULE, CLIPS.repeat(2, 1, 1, 1, 1))
    first, *traced = called
    assert not isinstance(first, FakeTensor) and len(first) == 2
    assert traced and all(isinstance(out, FakeTensor) for out in traced)
    hook.remove()
    optimized = optimize(model, SCHEDULE, backend="eager")
    optimized(CLIPS)
    assert [skip.node for skip in report.skips] == ["hooks"]  # ours, which is gone
    assert replace(report, skips=()) == optimized.report()


def test_on_the_meta_device(model: nn.Module) -> None:
    here = plan(model, SCHEDULE, CLIPS)
    there = plan(model.to("meta"), SCHEDULE, CLIPS[:1].to("meta"))
    assert (there.flops_dense, there.flops, there.macs) == (here.flops_dense, here.flops, here.macs)
    assert [b.tokens_out for b in there.blocks] == [b.tokens_out for b in here.blocks] == [16, 16]
    assert here.flops < here.flops_dense


def test_options_and_refusals_are_those_of_optimize(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="token_outputs"):
        plan(model, SCHEDULE, CLIPS, token_outputs="none")
    with pytest.raises(CompileError, match="the schedule names block 99"):
        plan(model, Schedule({99: 0.5}), CLIPS)
    with pytest.raises(InputError, match="was called with str; pass tensors"):
        plan(model, SCHEDULE, "clip.mp4")


def test_several_schedules_share_a_capture_and_nothing_else(model: nn.Module) -> None:
    schedules = [SCHEDULE, Schedule({0: 0.8}, score=MeanAttention()), Schedule({})]
    captures: list[Tensor] = []
    hook = model.get_submodule("encoder").register_forward_hook(
        lambda _m, _i, out: captures.append(out) if isinstance(out, FakeTensor) else None
    )
    handles = [optimize(model, schedule, backend="eager") for schedule in schedules]
    reports = list(plans(handles, CLIPS))
    # one capture with attention lowered, one without, for the schedule that prunes nothing
    assert len(captures) == 2
    for handle, schedule, report in zip(handles, schedules, reports, strict=True):
        out = handle(CLIPS)
        assert handle.report() == report
        assert torch.equal(out, optimize(model, schedule, backend="eager")(CLIPS))
    assert len(captures) == 2 + len(schedules)
    hook.remove()
