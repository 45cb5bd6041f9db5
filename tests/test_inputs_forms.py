"""Inputs in the forms that people pass: by keyword, in dicts and BatchFeature, in several sizes and memory formats."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import oracle
import pytest
import timm
import torch
import transformers
from generated import Config, GeneratedViT
from oracle import Pruning
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from zoo import ZOO

import rs_compile

TOLERANCE = 2e-4
APART = 0.01
CAPTURE = "capturing the model"
PRUNING = Pruning({0: 0.7, 1: 0.8}, protected=1)


class TakesDict(nn.Module):
    """A model that is given its inputs in one mapping."""

    def __init__(self, inner: nn.Module, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.inner, self.read = inner, read

    def forward(self, features: Any, scale: float = 1.0) -> Any:
        return self.inner(self.read(features) * scale)


class Features(UserDict[str, Any]):
    """A mapping class that torch has never seen, with attribute access as BatchFeature has it."""

    def __getattr__(self, name: str) -> Any:
        return self.data[name]


def by_key(features: Mapping[str, Tensor]) -> Tensor:
    return features["pixel_values"]


def by_attribute(features: Any) -> Tensor:
    pixels: Tensor = features.pixel_values
    return pixels


@torch.no_grad()
def wanted(images: Tensor, name: str = "hf_vit") -> dict[str, Tensor]:
    model = ZOO[name].model()
    pruned = ZOO[name].forward(model, images, PRUNING).outputs
    dense = oracle.named_outputs(model(images))
    apart = max(oracle.max_difference(pruned[k], dense[k]) for k in pruned)
    assert apart > APART, f"pruning changes only {apart:.1e}, the test could not fail"
    return pruned


def counted(model: nn.Module, **options: Any) -> tuple[rs_compile.OptimizedModel, list[str]]:
    """The model, pruned, and the list that its captures are written to."""
    said: list[str] = []
    return rs_compile.optimize(model, PRUNING.keep, backend="eager", progress=said.append, **options), said


@torch.no_grad()
def test_a_model_output_keeps_its_type_and_fields() -> None:
    images = ZOO["hf_vit"].images(2)
    fast, _ = counted(ZOO["hf_vit"].model())
    got = fast(images)
    assert type(got) is BaseModelOutputWithPooling
    assert got.to_tuple()[0] is got.last_hidden_state is got["last_hidden_state"]
    oracle.assert_close(got, wanted(images), TOLERANCE)


@torch.no_grad()
def test_batch_feature_as_keywords() -> None:
    """model(**processor(images)), and flags that change what is returned."""
    images = ZOO["hf_vit"].images(2)
    fast, said = counted(ZOO["hf_vit"].model())
    features = transformers.BatchFeature({"pixel_values": images})
    oracle.assert_close(fast(**features), wanted(images), TOLERANCE)
    with_states = fast(**features, output_hidden_states=True)
    assert len(with_states.hidden_states) == 4, "the flag is a part of the signature"
    as_tuple = fast(**features, return_dict=False)
    assert type(as_tuple) is tuple and torch.equal(as_tuple[0], with_states.last_hidden_state)
    fast(**features)
    assert said.count(CAPTURE) == 3


@pytest.mark.parametrize(
    ("container", "read"),
    [
        (dict, by_key),
        (Features, by_attribute),
        (MappingProxyType, by_key),
        (transformers.BatchFeature, by_attribute),
        (transformers.BatchEncoding, by_key),
    ],
)
@torch.no_grad()
def test_a_mapping_as_one_positional_input(container: Any, read: Any) -> None:
    inner = GeneratedViT(Config())
    fast, said = counted(TakesDict(inner, read))
    for batch, scale in ((2, 1.0), (1, 1.0), (3, 1.0), (3, 0.5)):
        images = inner.images(batch)
        got = fast(container({"pixel_values": images}), *([] if scale == 1 else [scale]))
        pruned = inner.forward_pruned(images * scale, PRUNING).outputs
        assert oracle.max_difference(pruned["output"], inner(images * scale)) > APART
        oracle.assert_close(got, pruned, TOLERANCE, f"{container.__name__}, {batch} samples times {scale}")
    assert said.count(CAPTURE) == 2, "the batch inside a mapping is symbolic; a number beside it is not"
    assert "float32[B, 3, 6, 8]" in str(fast.report())


@torch.no_grad()
def test_a_mapping_that_cannot_be_rebuilt_is_refused_by_name() -> None:
    class Sealed(UserDict[str, Any]):
        def __init__(self, images: Tensor) -> None:
            super().__init__(pixel_values=images)

    inner = GeneratedViT(Config())
    fast, _ = counted(TakesDict(inner, by_key))
    with pytest.raises(TypeError, match=r"TakesDict was called with Sealed; pass tensors, .* or a dict of them"):
        fast(Sealed(inner.images(1)))


@torch.no_grad()
def test_each_image_size_is_captured_once() -> None:
    options = {"img_size": 96, "depth": 2, "num_classes": 5, "dynamic_img_size": True}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **options)
    oracle.randomise(model.eval())
    fast, said = counted(model)
    sizes = ((96, 96), (64, 112), (80, 80))
    for turn, batch in enumerate((2, 3)):
        for h, w in sizes:
            images = torch.randn(batch, 3, h, w, generator=torch.Generator().manual_seed(h + turn))
            pruned = oracle.timm_vit(model, images, PRUNING).outputs
            oracle.assert_close(fast(images), pruned, TOLERANCE, f"{batch} of {h} x {w}")
            tokens = 1 + (h // 16) * (w // 16)
            assert fast.report().blocks[0].tokens_in == tokens, "the report is of the last call"
    assert said.count(CAPTURE) == len(sizes)


@torch.no_grad()
def test_channels_last(name: str = "deit_tiny") -> None:
    """Images and weights in channels_last; a batch of either format gets the same result."""
    model = ZOO[name].model()
    fast, _ = counted(model)
    images = ZOO[name].images(2)
    plain = oracle.named_outputs(fast(images))
    oracle.assert_close(plain, wanted(images, name), TOLERANCE, "contiguous")
    last = images.to(memory_format=torch.channels_last)
    oracle.assert_close(fast(last), plain, TOLERANCE, "channels_last images")
    model.to(memory_format=torch.channels_last)
    oracle.assert_close(fast(last), plain, TOLERANCE, "channels_last weights as well")
    strided = torch.cat([images, images + 1], 3)[..., ::2]
    oracle.assert_close(fast(strided), ZOO[name].forward(model, strided, PRUNING).outputs, TOLERANCE, "a view")
