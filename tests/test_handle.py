"""The handle among other things: inside what is compiled, traced or exported; other methods; changed code."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
from generated import Config, GeneratedViT
from oracle import Pruning
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.modules import module as nn_module
from torch.utils.flop_counter import FlopCounterMode

import rs_compile
from passes.graph.base import Refusal

TOLERANCE = 2e-4
PRUNING = Pruning({0: 0.7, 1: 0.8})


class Encoder(GeneratedViT):
    """With methods beside forward, as libraries have them."""

    def forward_features(self, images: Tensor) -> Tensor:
        return self.forward(images)

    def get_features(self, images: Tensor, times: float = 1.0) -> dict[str, Tensor]:
        return {"features": self.forward(images) * times}

    def predict(self, images: Tensor) -> Tensor:
        out: Tensor = self(images)
        return out.argmax(-1)

    def forward_head(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def made(**options: Any) -> tuple[Encoder, Tensor, Any, Tensor]:
    """A model, images, its handle, and what pruning by hand gives."""
    model = Encoder(Config())
    images = model.images(2)
    wanted = model.forward_pruned(images, PRUNING).outputs["output"]
    assert oracle.max_difference(wanted, model(images)) > 0.01
    return model, images, rs_compile.optimize(model, PRUNING.keep, **{"backend": "eager", **options}), wanted


@pytest.mark.parametrize("called", [False, True], ids=["never called", "called"])
def test_inside_a_compiled_module(called: bool) -> None:
    """Planning is no part of the graph around it, and later changes are seen."""
    model, images, fast, wanted = made()
    if called:
        fast(images)
    torch.compiler.reset()
    outer = torch.compile(nn.Sequential(fast, nn.Softmax(-1)), backend="eager")
    for batch in (2, 1):
        oracle.assert_close(outer(images[:batch]), wanted[:batch].softmax(-1), TOLERANCE, f"{batch} samples")
    model.typed_blocks()[0].mlp.register_forward_hook(lambda module, args, out: out * 0.5)
    after = model.forward_pruned(images, PRUNING).outputs["output"].softmax(-1)
    oracle.assert_close(outer(images), after, TOLERANCE, "with a hook")


@pytest.mark.slow
@pytest.mark.inductor
def test_inside_a_compiled_module_through_inductor() -> None:
    _, images, fast, wanted = made(backend="inductor")
    torch.compiler.reset()
    outer = torch.compile(nn.Sequential(fast, nn.Softmax(-1)))
    oracle.assert_close(outer(images), wanted.softmax(-1), TOLERANCE, "both compiled")


def test_gradients_are_compiled_for() -> None:
    """Though Dynamo is told to leave the handle alone, it follows the graph inside."""
    _, images, fast, wanted = made(backend="aot_eager")
    torch.compiler.reset()
    counters.clear()
    with torch.enable_grad():
        got = fast(images)
    assert counters["stats"]["unique_graphs"] == 1 and got.requires_grad
    oracle.assert_close(got.detach(), wanted, TOLERANCE, "aot_eager")


def test_tracers_are_told_what_to_trace() -> None:
    """And what torch.export is given after a call is what a call gives."""
    _, images, fast, wanted = made()
    with pytest.raises(Refusal, match=r"torch.export cannot follow.*first call.*\n  way out: call it once before"):
        torch.export.export(fast, (images,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            Refusal, match=r"jit.trace cannot follow an optimized model \[RSC-206\]\n  way out: rs_compile.e"
        ):
            torch.jit.trace(fast, images)
    eager = fast(images)
    exported = torch.export.export(fast, (images,), dynamic_shapes=(({0: torch.export.Dim.DYNAMIC},),))
    assert torch.equal(exported.module()(images), eager)
    oracle.assert_close(exported.module()(images[:1]), wanted[:1], TOLERANCE, "exported, one sample")
    assert set(exported.state_dict) == set(fast.state_dict())


def test_torch_export_is_given_no_graph_of_another_mode() -> None:
    _, images, fast, _ = made()
    fast(images)
    fast.train()
    with pytest.raises(Refusal, match="call it once before, in the same mode"):
        torch.export.export(fast, (images,))


def test_models_that_are_no_code_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
        traced = torch.jit.trace(nn.Linear(4, 4), torch.zeros(1, 4))
    for model in (scripted, traced):
        with pytest.raises(TypeError, match=r"scripted or traced by torch\.jit.*pass the module that it was made from"):
            rs_compile.optimize(model, {0: 0.7})


def test_a_model_that_holds_a_handle_is_refused() -> None:
    _, _, fast, _ = made()
    with pytest.raises(TypeError, match=r"'1.0' in the model is optimized already.*optimize the whole"):
        rs_compile.optimize(nn.Sequential(nn.Identity(), nn.Sequential(fast)), {0: 0.7})


def test_a_hook_on_every_module_is_refused() -> None:
    """It would run on the handle and on the graph as well; torch's own count, and may."""
    _, images, fast, wanted = made()
    fast(images)
    hook = nn_module.register_module_forward_hook(lambda module, args, out: None)
    try:
        with pytest.raises(Refusal, match=r"a hook on all modules of the process.*\n.*module.register_forward_hook"):
            fast(images)
    finally:
        hook.remove()
    with FlopCounterMode(display=False) as counted:
        oracle.assert_close(fast(images), wanted, TOLERANCE, "counted")
    assert counted.get_total_flops() > 0


def test_another_class_and_another_forward() -> None:
    """Code that is changed after a first call."""
    model, images, fast, _ = made()
    block = model.typed_blocks()[0]

    whole = type(block.mlp)
    half = type("Half", (whole,), {"forward": lambda self, x: whole.forward(self, x) * 0.5})

    def check(what: str) -> Tensor:
        now = model.forward_pruned(images, PRUNING).outputs["output"]
        oracle.assert_close(fast(images), now, TOLERANCE, what)
        return now

    before = check("as it was")
    kept = type(block.mlp)
    block.mlp.__class__ = half
    assert oracle.max_difference(check("another class"), before) > 0.01
    block.mlp.__class__ = kept
    check("its own again")
    with pytest.MonkeyPatch.context() as patch:
        plain = nn.LayerNorm.forward
        patch.setattr(nn.LayerNorm, "forward", lambda self, x: plain(self, x) * 1.5)
        assert oracle.max_difference(check("another forward"), before) > 0.01
    check("and back")


def test_other_methods_are_pruned_where_asked_for() -> None:
    _, images, fast, wanted = made(method=("forward_features", "get_features"))
    oracle.assert_close(fast.forward_features(images), wanted, TOLERANCE, "forward_features")
    assert fast.report().macs == fast.forward_features.report().macs
    for handle in (fast, copy.deepcopy(fast)):
        got = handle.get_features(images, times=2.0)
        oracle.assert_close(got["features"], wanted * 2, TOLERANCE, "get_features")
        oracle.assert_close(handle(images), wanted, TOLERANCE, "forward")


def test_attributes_and_mode_of_the_model_count_for_its_methods() -> None:
    model, images, fast, wanted = made(method="get_features")
    fast.get_features(images)
    model.norm.register_forward_hook(lambda module, args, out: out * 2)
    now = model.forward_pruned(images, PRUNING).outputs["output"]
    assert oracle.max_difference(now, wanted) > 0.01
    oracle.assert_close(fast.get_features(images)["features"], now, TOLERANCE, "with a hook")
    fast.train()
    assert fast.get_features(images)["features"].shape == now.shape
    assert "train mode" in str(fast.report())


def test_plan_takes_a_method() -> None:
    model, images, _, _ = made()
    report = rs_compile.plan(model, PRUNING.keep, images, method="get_features")
    assert report.macs == rs_compile.plan(model, PRUNING.keep, images).macs


@pytest.mark.parametrize("name", ["forward_features", "get_features", "predict"])
def test_a_method_that_is_not_pruned_says_so_once(name: str) -> None:
    model, images, fast, _ = made()
    method: Callable[..., Any] = getattr(fast, name)
    with pytest.warns(UserWarning, match=rf"Encoder\.{name} ran as the model has it.*method=\"{name}\"\)"):
        got = method(images)
    assert torch.equal(
        *(out["features"] if name == "get_features" else out for out in (got, getattr(model, name)(images)))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(fast, name)(images)


def test_methods_that_run_no_layers_are_silent() -> None:
    _, _, fast, _ = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fast.no_weight_decay() == {"cls_token"}
        fast.forward_head(torch.zeros(1, 3, fast.norm.weight.shape[0]))
        assert len(fast.state_dict()) == len(list(fast.parameters())) + len(list(fast.buffers()))


@pytest.mark.parametrize("name", ["forward", "nothing", "norm", "eval", "_private"])
def test_a_name_that_is_no_method_of_the_model(name: str) -> None:
    with pytest.raises(ValueError, match=rf"method names '{name}'.*Encoder has .*forward_features"):
        made(method=name)


def test_parameters_are_shared_both_ways() -> None:
    """As the docstring says."""
    model, images, fast, _ = made()
    fast.double()
    assert next(model.parameters()).dtype is torch.float64 and fast(images.double()).dtype is torch.float64
    fast.train()
    assert model.training
