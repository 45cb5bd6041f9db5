"""`plan`: the report of `optimize` without a forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rs_compile import CompileError, InputError, Schedule, optimize, plan
from rs_compile.models import build

SCHEDULE = Schedule({0: 0.8, 2: 0.5})


def test_it_is_the_report_of_optimize() -> None:
    model, images = build("test_vit", img_size=64), torch.randn(2, 3, 64, 64)
    optimized = optimize(model, SCHEDULE, backend="eager")
    optimized(images)
    assert plan(model, SCHEDULE, images) == optimized.report()


def test_on_the_meta_device() -> None:
    model, images = build("test_vit", img_size=64), torch.randn(1, 3, 64, 64)
    here = plan(model, SCHEDULE, images)
    there = plan(model.to("meta"), SCHEDULE, images.to("meta"))
    assert (there.flops_dense, there.flops, there.macs) == (here.flops_dense, here.flops, here.macs)
    assert [b.tokens_out for b in there.blocks] == [b.tokens_out for b in here.blocks]
    assert here.flops < here.flops_dense


def test_no_kernel_runs() -> None:
    model = build("test_vit", img_size=64).double()
    called: list[Tensor] = []
    model.get_submodule("blocks.0").register_forward_hook(lambda _m, _i, out: called.append(out))
    plan(model, SCHEDULE, torch.randn(1, 3, 64, 64, dtype=torch.float64))
    assert called and all(isinstance(out, torch._subclasses.FakeTensor) for out in called)


def test_options_and_refusals_are_those_of_optimize() -> None:
    model, images = build("test_vit", img_size=64), torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="token_outputs"):
        plan(model, SCHEDULE, images, token_outputs="none")
    with pytest.raises(CompileError, match="the schedule names block 99"):
        plan(model, Schedule({99: 0.5}), images)
    with pytest.raises(InputError, match="was called with str; pass tensors"):
        plan(model, SCHEDULE, "photo.png")
