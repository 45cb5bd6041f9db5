"""Inputs that a model does not run on, models that cannot be captured: each with the way out that helps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

import rs_compile
from passes import pipeline
from passes.capture.capture_errors import not_captured
from rs_compile import explain as explain_function

optimize_module: Any = sys.modules[rs_compile.optimize.__module__]
explain_module: Any = sys.modules[explain_function.__module__]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + x.softmax(1).mean(1, keepdim=True)
        return x + self.mlp(x)


class Picture(nn.Module):
    """Patches of 4 x 4 of an image of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor, scale: int = 1) -> Tensor:
        assert x.shape[-1] == 8, f"images of 8 x 8, not of {x.shape[-1]}"
        x = self.embed(x * scale)
        return self.blocks(x.flatten(2).transpose(1, 2)).mean(1)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Picture().eval()


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def error_of(run: Callable[[], Any]) -> str:
    with pytest.raises(rs_compile.CaptureError) as error:
        run()
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


@pytest.mark.parametrize(
    ("given", "reason", "way_out", "mended"),
    [
        (
            images()[0],
            "does not run on float32[3, 8, 8] on cpu",
            "add the batch dimension in front, x[None]",
            images()[:1],
        ),
        (images().half(), "does not run on float16[3, 3, 8, 8]", "pass x.to(torch.float32)", images().half().float()),
        (
            torch.ones(3, 3, 8, 8, dtype=torch.uint8),
            "does not run on uint8[3, 3, 8, 8]",
            "its parameters are torch.float32: pass x.to(torch.float32), scaled as the model expects",
            torch.ones(3, 3, 8, 8),
        ),
        (list(images()), "'list' object has no attribute", "torch.stack(list)", images()),
    ],
)
def test_inputs_that_another_form_mends(
    model: nn.Module, given: Any, reason: str, way_out: str, mended: Tensor
) -> None:
    for run in (
        lambda: rs_compile.optimize(model, {0: 0.5}, backend="eager")(given),
        lambda: rs_compile.explain(model, given),
        lambda: rs_compile.plan(model, {0: 0.5}, given),
    ):
        text = error_of(run)
        assert reason in text and way_out in text.splitlines()[-1], text
        assert "independent of the data" not in text
    rs_compile.optimize(model, {0: 0.5}, backend="eager")(mended)


def test_another_image_size_is_the_models_own_error(model: nn.Module) -> None:
    text = error_of(lambda: rs_compile.explain(model, torch.randn(2, 3, 12, 12)))
    assert text.startswith(
        "Picture does not run on float32[2, 3, 12, 12] on cpu: images of 8 x 8, not of 12 [RSC-201]\n"
    )
    assert "test_capture_errors.py" in text and "way out: model(x) raises the same: check the number, the sizes" in text


@pytest.mark.parametrize("training", [False, True])
def test_a_wrong_keyword(model: nn.Module, training: bool) -> None:
    text = error_of(lambda: rs_compile.optimize(model.train(training), {0: 0.5}, backend="eager")(images(), mask=1))
    assert "got an unexpected keyword argument 'mask'" in text and "Picture.forward takes (x: 'Tensor', scale" in text
    assert "way out: call it with these arguments" in text


def test_real_inputs_for_a_meta_model(model: nn.Module) -> None:
    model.to("meta")
    text = error_of(lambda: rs_compile.plan(model, {0: 0.5}, images()))
    assert "embed.weight of Picture is on the meta device, and the inputs are on cpu [RSC-201]\n" in text
    assert "x.to('meta'); or load the weights first" in text
    rs_compile.plan(model, {0: 0.5}, images().to("meta"))


def test_offloaded_parameters() -> None:
    model = Picture().eval()
    wanted = model(images())
    accelerate.cpu_offload(model, execution_device="cpu")
    fast = rs_compile.optimize(model, {0: 1.0}, backend="eager")
    for run in (lambda: fast(images()), lambda: rs_compile.explain(model, images())):
        text = error_of(run)
        assert "is on the meta device, and the inputs are on cpu; hooks load it while the model runs" in text
        assert "way out: load the whole model onto one device: without offloading, or its hooks removed" in text
    assert torch.equal(model(images()), wanted)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(fast(images()), wanted)


def test_plain_tensors_in_the_place_of_parameters(model: nn.Module) -> None:
    fast = rs_compile.optimize(model, {0: 1.0}, backend="eager")
    other = {name: 2 * value.detach() for name, value in model.named_parameters()}
    text = error_of(lambda: torch.func.functional_call(fast, other, (images(),)))
    assert "the parameter embed.weight of Picture is a plain tensor, as torch.func.functional_call puts there" in text
    wrapped = {name: nn.Parameter(value) for name, value in other.items()}
    wanted = torch.func.functional_call(model, other, (images(),))
    torch.testing.assert_close(torch.func.functional_call(fast, wrapped, (images(),)).detach(), wanted)


def test_an_empty_batch_may_come_first(model: nn.Module) -> None:
    fast = rs_compile.optimize(model, {0: 0.5}, backend="eager")
    assert fast(images(0)).shape == (0, 8)
    assert fast(images()).shape == (3, 8)


def test_a_long_message_goes_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    cause = RuntimeError("\n".join(["no such op", *(f"%node{i} = graph" for i in range(300))]))
    with caplog.at_level("INFO", "passes.capture.capture_errors"):
        error = not_captured(Picture(), cause, (), ran=True)
    assert "%node299" in caplog.text and "%node299" not in str(cause)
    assert "(281 more lines in the log of passes.capture.capture_errors)" in str(cause)
    assert str(error).startswith("torch.export cannot capture Picture: no such op [RSC-202]\n")
    assert "way out: the model runs, so write that line with ops that torch.export traces" in str(error)


class Strange(Exception):
    pass


def strange(*_: Any, **__: Any) -> Any:
    raise Strange("as nobody expects\nat length")


STAGES = [
    (optimize_module, "capture"),
    (optimize_module, "check_inputs"),
    (optimize_module, "check_faithful"),
    (optimize_module, "cleaned"),
    (optimize_module, "rewrite"),
    (optimize_module, "check_cuts"),
    (optimize_module, "make_program"),
    (pipeline, "find_branches"),
    (pipeline, "count"),
]


def named_error(run: Callable[[], Any], what: str) -> None:
    with pytest.raises(rs_compile.CompileError) as error:
        run()
    assert str(error.value).startswith(
        f"{what} failed: Strange: as nobody expects [RSC-999]\n  way out: the model is as it was"
    )
    assert type(error.value.__cause__) is Strange


@pytest.mark.parametrize(("module", "name"), STAGES)
def test_a_strange_error_in_any_stage_of_optimize_is_ours(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    fast = rs_compile.optimize(model, {0: 0.5}, backend="eager")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, strange)
        named_error(lambda: fast(images()), "optimize")
        if name not in ("check_faithful", "check_cuts"):
            named_error(lambda: rs_compile.plan(model, {0: 0.5}, images()), "plan")
    assert fast(images()).shape == (3, 8)


@pytest.mark.parametrize("name", ["flatten", "check_inputs", "prepare", "block_kernels", "prunable", "find_stages"])
def test_a_strange_error_in_any_stage_of_explain_is_ours(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(explain_module, name, strange)
    named_error(lambda: rs_compile.explain(model, images()), "explain")


def test_a_strange_error_of_a_backend_is_ours(model: nn.Module) -> None:
    fast = rs_compile.optimize(model, {0: 0.5}, backend=strange)
    with pytest.raises(rs_compile.CompileError, match=r"optimize failed: .*Strange"):
        fast(images())


def test_want_of_memory_is_told_as_it_is(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("32 GiB")

    monkeypatch.setattr(optimize_module, "rewrite", full)
    with pytest.raises(torch.OutOfMemoryError):
        rs_compile.optimize(model, {0: 0.5}, backend="eager")(images())


class Masked(nn.Module):
    """Random masking by indices that argsort gives, or by a mask whose count only the data tells."""

    def __init__(self, by_mask: bool) -> None:
        super().__init__()
        self.blocks, self.by_mask = nn.Sequential(Block(), Block()), by_mask

    def forward(self, x: Tensor) -> Tensor:
        order = torch.rand(x.shape[:2], device=x.device).argsort(1)
        few = order[:, :4, None].expand(-1, -1, 8)
        x = x[order < 4].reshape(len(x), -1, 8) if self.by_mask else x.gather(1, few)
        return self.blocks(x)


def test_random_masking() -> None:
    x = torch.randn(3, 9, 8)
    model = Masked(by_mask=False).eval()
    torch.manual_seed(0)
    wanted = model(x)
    torch.manual_seed(0)
    assert torch.equal(rs_compile.optimize(model, {0: 1.0}, backend="eager")(x), wanted)
    assert rs_compile.plan(model, {0: 0.5}, x).blocks[0].tokens_out == 2
    for run in (
        lambda: rs_compile.optimize(Masked(by_mask=True).eval(), {0: 0.5}, backend="eager")(x),
        lambda: rs_compile.plan(Masked(by_mask=True).eval(), {0: 0.5}, x),
    ):
        with pytest.raises(rs_compile.CompileError, match="way out: "):
            run()


class MaskedBetween(Masked):
    """Takes tokens by a mask between two stages, as many as the mask has."""

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x)[:, torch.rand(x.shape[1]) < 0.5])


def test_a_number_of_tokens_that_depends_on_the_data() -> None:
    model, x = MaskedBetween(by_mask=True).eval(), torch.randn(3, 9, 8)
    for run in (
        lambda: rs_compile.optimize(model, {0: 0.5}, backend="eager", verify=False)(x),
        lambda: rs_compile.plan(model, {0: 0.5}, x),
    ):
        with pytest.raises(rs_compile.Refusal, match="how many entries it gives depends on the data") as error:
            run()
        assert "aten.index.Tensor" in str(error.value) and "test_capture_errors.py" in str(error.value)
        assert "way out: let the model take a fixed number of them (topk" in str(error.value)
