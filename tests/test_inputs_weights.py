"""Weights as people have them: quantised by torchao, wrapped by PEFT, copied, saved and loaded."""

from __future__ import annotations

import gc
import io
import weakref
from typing import Any

import oracle
import pytest
import torch
from generated import Config, GeneratedViT
from oracle import Pruning
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_
from zoo import ZOO

import rs_compile

TOLERANCE = 2e-4
APART = 0.01
CAPTURE = "capturing the model"
PRUNING = Pruning({0: 0.7, 1: 0.8}, protected=1)


def wanted(name: str, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    return ZOO[name].forward(model, images, PRUNING).outputs


def optimized(model: nn.Module, **options: Any) -> rs_compile.OptimizedModel:
    return rs_compile.optimize(model, PRUNING.keep, **{"backend": "eager", **options})


def int8_linears(model: nn.Module) -> int:
    return sum(isinstance(m.weight, Int8Tensor) for m in model.modules() if isinstance(m, nn.Linear))


@torch.no_grad()
def test_quantised_before_optimizing() -> None:
    """int8 weights stay int8: the graph reads them and makes them wide where the model does; costs are the same."""
    entry = ZOO["hf_vit_eager"]
    model, images = entry.model(), entry.images(2)
    plain = rs_compile.plan(model, PRUNING.keep, images)
    dense = entry.forward(model, images, PRUNING).outputs
    quantize_(model, Int8WeightOnlyConfig())
    assert int8_linears(model) > 10
    fast = optimized(model)
    quantised = entry.forward(model, images, PRUNING).outputs
    apart = max(oracle.max_difference(quantised[k], dense[k]) for k in dense)
    assert apart > APART, f"quantisation changes only {apart:.1e}"
    oracle.assert_close(fast(images), quantised, TOLERANCE, "quantised")
    report = fast.report()
    assert (report.macs, report.flops) == (plain.macs, plain.flops)
    assert not report.skips, "something is left uncounted"
    read = {n.target for n in fast.graph_module().graph.find_nodes(op="get_attr")}
    assert read >= {"layers.0.mlp.fc1.weight", "layers.2.mlp.fc2.weight"}, "a wide copy was made"


@pytest.mark.slow
@pytest.mark.inductor
@torch.no_grad()
def test_quantised_through_inductor() -> None:
    model = GeneratedViT(Config())
    images = model.images(2)
    quantize_(model, Int8WeightOnlyConfig())
    got, code = run_and_get_code(optimized(model, backend="inductor"), images)
    oracle.assert_close(got, model.forward_pruned(images, PRUNING).outputs, 1e-3)
    assert "const int8_t*" in code[0], "the kernels do not read int8 weights"


@pytest.mark.parametrize("through", ["model", "handle"])
@torch.no_grad()
def test_quantised_after_optimizing(through: str) -> None:
    """The next call sees the new weights, the handle has them too, and the old ones are let go."""
    model = GeneratedViT(Config())
    images = model.images(2)
    said: list[str] = []
    fast = optimized(model, progress=said.append)
    before = fast(images)
    old = weakref.ref(model.typed_blocks()[0].attn.proj.weight)
    quantize_(model if through == "model" else fast, Int8WeightOnlyConfig())
    assert int8_linears(model) == int8_linears(fast) > 5
    got = fast(images)
    assert oracle.max_difference(got, before) > TOLERANCE, "the weights of before were used"
    oracle.assert_close(got, model.forward_pruned(images, PRUNING).outputs, 1e-5)
    assert said.count(CAPTURE) == 2
    gc.collect()
    assert old() is None, "the plan for the old weights keeps them in memory"


def lora(name: str, targets: list[str]) -> tuple[Any, Tensor]:
    """A model with random adapters on these layers."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return get_peft_model(ZOO[name].model(), config).eval(), ZOO[name].images(2)


LORA = [
    ("hf_vit", ["q_proj", "v_proj", "o_proj", "fc2"]),
    ("deit_tiny", ["qkv", "proj", "fc1", "fc2"]),
]


@pytest.mark.parametrize(("name", "targets"), LORA)
def test_adapters_train_through_the_handle(name: str, targets: list[str]) -> None:
    model, images = lora(name, targets)
    base = model.base_model.model
    fast = optimized(model)

    def gradients(outputs: Any) -> dict[str, Tensor]:
        model.zero_grad()
        torch.stack([t.square().mean() for t in oracle.named_outputs(outputs).values()]).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    by_hand = wanted(name, base, images)
    got = fast(images)
    oracle.assert_close(got, by_hand, TOLERANCE, name)
    expected, own = gradients(by_hand), gradients(got)
    assert len(own) >= 3 * 2 * len(targets) and all("lora_" in n for n in own), "adapters learn, and nothing else"
    assert own.keys() == expected.keys()
    for key, gradient in expected.items():
        gap = oracle.max_difference(own[key], gradient)
        assert gap <= 1e-3 * gradient.abs().max().clamp_min(1), f"{key}: {gap:.1e}"
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
        trained = wanted(name, base, images)
        assert max(oracle.max_difference(trained[k], by_hand[k]) for k in trained) > APART
        oracle.assert_close(fast(images), trained, TOLERANCE, "after a step")


@torch.no_grad()
def test_adapters_merged_disabled_and_back() -> None:
    """PEFT keeps all that in attributes of its layers; a captured graph must not outlive them."""
    name, targets = LORA[0]
    model, images = lora(name, targets)
    base = model.base_model.model
    said: list[str] = []
    fast = optimized(model, progress=said.append)
    adapted = {k: t.clone() for k, t in oracle.named_outputs(fast(images)).items()}
    oracle.assert_close(adapted, wanted(name, base, images), TOLERANCE, "adapted")
    with model.disable_adapter():
        without = wanted(name, base, images)
        oracle.assert_close(fast(images), without, TOLERANCE, "disabled")
    assert max(oracle.max_difference(adapted[k], without[k]) for k in without) > APART
    model.merge_adapter()
    oracle.assert_close(fast(images), adapted, 1e-3, "merged")
    model.unmerge_adapter()
    oracle.assert_close(fast(images), adapted, 1e-3, "unmerged")
    assert said.count(CAPTURE) == 3, "adapted, disabled, merged"


@torch.no_grad()
def test_state_dict_through_a_file() -> None:
    """The handle's state dict is the model's, in either direction, and after the first call too."""
    model, other = (GeneratedViT(Config(seed=seed)) for seed in range(2))
    images = model.images(2)
    fast, other_fast = optimized(model), optimized(other)
    called = fast(images)
    assert oracle.max_difference(other_fast(images), called) > APART
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state) == list(model.state_dict())
    other_fast.load_state_dict(state)
    oracle.assert_close(other_fast(images), {"output": called}, 0.0, "loaded through a handle")
    oracle.assert_close(other(images), {"output": model(images)}, 0.0, "which is the model itself")


@torch.no_grad()
def test_the_whole_handle_through_a_file() -> None:
    model = GeneratedViT(Config())
    images = model.images(2)
    fast = optimized(model)
    called = fast(images)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    oracle.assert_close(again(images), {"output": called}, 0.0, "a handle of its own model")
    assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert again.report().macs == fast.report().macs
