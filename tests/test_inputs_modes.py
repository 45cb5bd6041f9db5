"""The circumstances of a call: precision, autocast, inference mode, dropout, flags that someone sets on the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import timm
import torch
import transformers
from generated import Config, GeneratedViT
from oracle import Pruning
from torch import Tensor, nn
from zoo import ZOO

import rs_compile

TOLERANCE = 2e-4
APART = 0.01
CAPTURE = "capturing the model"
PRUNING = Pruning({0: 0.7, 1: 0.8}, protected=1)


def optimized(model: nn.Module, **options: Any) -> rs_compile.OptimizedModel:
    return rs_compile.optimize(model, PRUNING.keep, backend="eager", **options)


@pytest.mark.parametrize("name", ["deit_tiny", "hf_vit_eager"])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16])
@torch.no_grad()
def test_half_precision_models(dtype: torch.dtype, name: str) -> None:
    """Bit-equal to pruning by hand in the same precision; scores alone are float32, and no wide tensor stays."""
    entry = ZOO[name]
    model, images = entry.model().to(dtype), entry.images(2).to(dtype)
    fast = optimized(model, lower_attention=False, drop_unread=False)  # which rounds otherwise
    wanted = entry.forward(model, images, PRUNING)
    assert all(t.dtype == dtype for t in oracle.named_outputs(wanted.outputs).values())
    oracle.assert_close(fast(images), wanted.outputs, 0.0, name)


@torch.no_grad()
def test_autocast_around_the_call(name: str = "hf_vit") -> None:
    """As pruning by hand under the same autocast; with and without it are signatures of their own."""
    entry = ZOO[name]
    model, images = entry.model(), entry.images(2)
    said: list[str] = []
    fast = optimized(model, progress=said.append)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, wanted = fast(images), entry.forward(model, images, PRUNING)
        assert any(t.dtype == torch.bfloat16 for t in wanted.outputs.values())
        oracle.assert_close(got, wanted.outputs, 0.0, "under autocast")
        full = entry.forward(model, images, PRUNING)
        oracle.assert_close(fast(images), full.outputs, TOLERANCE, "without")
    assert said.count(CAPTURE) == 2


class Normalises(nn.Module):
    """Makes constants in its forward, which a capture holds as tensors of its own."""

    def __init__(self, inner: GeneratedViT) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        scale = torch.tensor([0.5, 0.6, 0.7])[:, None, None]
        return self.inner(images / scale)


@pytest.mark.parametrize(
    ("backend", "modes"),
    [
        ("eager", ("inference", "gradients", "inference")),
        ("eager", ("gradients", "inference", "gradients")),
        pytest.param("inductor", ("inference", "gradients"), marks=[pytest.mark.inductor, pytest.mark.slow]),
    ],
)
def test_inference_mode_and_gradients_take_turns(backend: str, modes: tuple[str, ...]) -> None:
    """Whichever mode the first call was in, the other works and is right, on one capture."""
    inner = GeneratedViT(Config(rope=True, mask="computed", tables_no_grad=True))
    model = Normalises(inner)
    images = inner.images(2)
    scale = torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    said: list[str] = []
    fast = rs_compile.optimize(model, PRUNING.keep, backend=backend, progress=said.append)
    wanted = inner.forward_pruned(images / scale, PRUNING).outputs["output"]
    wanted.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for mode in modes:
        if mode == "inference":
            with torch.inference_mode():
                got = fast(images)
                assert got.is_inference()
                oracle.assert_close(fast(images.clone()), wanted.detach(), TOLERANCE, "an inference tensor as input")
        else:
            model.zero_grad()
            got = fast(images)
            got.square().sum().backward()
            for name, p in model.named_parameters():
                assert p.grad is not None, f"no gradient for {name}"
                gap = oracle.max_difference(p.grad, gradients[name])
                assert gap <= 1e-3 * gradients[name].abs().max().clamp_min(1), f"{name}: {gap:.1e} after {modes}"
        oracle.assert_close(got.detach(), wanted.detach(), TOLERANCE, mode)
    assert said.count(CAPTURE) == 1


@torch.no_grad()
def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = ZOO["hf_vit"].model()
        images = ZOO["hf_vit"].images(2)
        got = optimized(model)(images)
    wanted = ZOO["hf_vit"].forward(ZOO["hf_vit"].model(), images, PRUNING).outputs
    oracle.assert_close(got, wanted, TOLERANCE)


def dropping(name: str) -> tuple[nn.Module, Tensor, Any]:
    """A model with dropout everywhere, images and its oracle."""
    entry = ZOO[name]
    if name == "deit_tiny":
        rates = {"drop_rate": 0.1, "pos_drop_rate": 0.1, "proj_drop_rate": 0.2, "attn_drop_rate": 0.1}
        model = timm.create_model("deit_tiny_patch16_224", img_size=96, depth=3, num_classes=10, **rates)
    else:
        config = entry.model().config
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.2
        model = transformers.ViTModel(config)
    return oracle.randomise(model), entry.images(2), entry.forward


@pytest.mark.parametrize("name", ["deit_tiny", "hf_vit"])
def test_train_mode_with_dropout(name: str) -> None:
    """The same random numbers fall on the same values as in pruning by hand: equal, gradients too."""
    model, images, forward = dropping(name)
    fast = optimized(model.train())

    def step(run: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(7)
        model.zero_grad()
        outputs = oracle.named_outputs(run())
        torch.stack([t.square().mean() for t in outputs.values()]).sum().backward()
        return outputs, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    fast(images)  # the capture must not count among the draws
    wanted, gradients = step(lambda: forward(model, images, PRUNING).outputs)
    got, own = step(lambda: fast(images))
    oracle.assert_close(got, wanted, TOLERANCE, "in training")
    assert own.keys() == gradients.keys()
    for key, gradient in gradients.items():
        gap = oracle.max_difference(own[key], gradient)
        assert gap <= 1e-3 * gradient.abs().max().clamp_min(1), f"{key}: {gap:.1e}"
    again = oracle.named_outputs(fast(images))
    assert max(oracle.max_difference(again[k], got[k]) for k in got) > APART, "no dropout was drawn"
    fast.eval()
    with torch.no_grad():
        still = fast(images)
        oracle.assert_close(still, forward(model, images, PRUNING).outputs, TOLERANCE, "eval after train")
        oracle.assert_close(fast(images), oracle.named_outputs(still), 0.0, "eval is not random")
    fast.train()
    oracle.assert_close(step(lambda: fast(images))[0], wanted, TOLERANCE, "train again")


class Switches(nn.Module):
    """Reads attributes that anybody may set, and counts its calls."""

    def __init__(self, inner: GeneratedViT) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0
        self.skipped: list[str] = []
        self.options = SimpleNamespace(tanh=True)

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.inner(images if "flip" in self.skipped else images.flip(3))
        return out.tanh() if self.options.tanh else out


@torch.no_grad()
def test_attributes_that_a_forward_reads_are_part_of_the_signature() -> None:
    inner = GeneratedViT(Config())
    model, images = Switches(inner), inner.images(2)
    said: list[str] = []
    fast = optimized(model, progress=said.append)

    def check(given: Tensor, tanh: bool, captures: int) -> None:
        wanted = inner.forward_pruned(given, PRUNING).outputs["output"]
        oracle.assert_close(fast(images), wanted.tanh() if tanh else wanted, TOLERANCE, f"{captures} captures")
        assert said.count(CAPTURE) == captures

    check(images.flip(3), True, 1)
    check(images.flip(3), True, 1)  # though the capture counted one call
    model.skipped.append("flip")  # a list changed in place
    check(images, True, 2)
    model.options.tanh = False  # a flag on an object
    check(images, False, 3)
    model.options.tanh = True
    model.skipped.clear()
    check(images.flip(3), True, 3)  # as it was at first


@torch.no_grad()
def test_a_hook_is_a_part_of_the_model() -> None:
    model = GeneratedViT(Config())
    images = model.images(2)
    fast = rs_compile.optimize(model, {0: 1.0}, backend="eager")
    assert torch.equal(fast(images), model(images))
    hook = model.typed_blocks()[0].mlp.register_forward_hook(lambda module, args, out: out * 0.5)
    assert torch.equal(fast(images), model(images)), "with a hook"
    hook.remove()
    assert torch.equal(fast(images), model(images)), "without it"
