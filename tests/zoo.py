"""The real architectures that the oracle knows, with random weights, small: depth 2 or 3, up to 51 tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracle
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """A model to build, an input for it [batch, ...], its oracle and how many prefix tokens it has."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    forward: Callable[[Any, Tensor, oracle.Pruning], oracle.Result]
    prefix: int

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return oracle.randomise(self.build().eval())

    def images(self, batch: int, seed: int = 0) -> Tensor:
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(seed))


def _timm(name: str, img_size: int, prefix: int, depth: int = 3, **options: Any) -> Entry:
    options = {"num_classes": 10, "img_size": img_size, "depth": depth, **options}
    return Entry(
        lambda: timm.create_model(name, pretrained=False, **options),
        (3, img_size, img_size),
        oracle.timm_vit,
        prefix,
    )


_SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 48,
    "patch_size": 8,
}


def _hf(
    model: str,
    config: str,
    forward: Callable[[Any, Tensor, oracle.Pruning], oracle.Result],
    prefix: int = 1,
    shape: tuple[int, ...] = (3, 48, 48),
    attention: str = "sdpa",
    **options: Any,
) -> Entry:
    def build() -> nn.Module:
        settings = getattr(transformers, config)(**{**_SMALL, **options}, attn_implementation=attention)
        return getattr(transformers, model)(settings)

    return Entry(build, shape, forward, prefix)


_VIDEO: dict[str, Any] = {
    "num_frames": 4,
    "tubelet_size": 2,
    "image_size": 40,
    "shape": (4, 3, 40, 40),
    "prefix": 0,
}

ZOO: dict[str, Entry] = {
    "deit_tiny": _timm("deit_tiny_patch16_224", 96, 1),
    "deit_small": _timm("deit_small_patch16_224", 96, 1, depth=2),
    "deit_tiny_distilled": _timm("deit_tiny_distilled_patch16_224", 96, 2),
    "dinov2_reg4": _timm("vit_small_patch14_reg4_dinov2", 98, 5, depth=2),
    "siglip": _timm("vit_base_patch16_siglip_224", 96, 0, depth=2),
    "vit_average": _timm("vit_tiny_patch16_224", 96, 1, global_pool="avg"),
    "vit_average_no_class": _timm("vit_tiny_patch16_224", 96, 0, global_pool="avg", class_token=False, num_classes=0),
    "vit_all_tokens": _timm("vit_tiny_patch16_224", 96, 1, global_pool="", num_classes=0),
    "hf_vit": _hf("ViTModel", "ViTConfig", oracle.hf_vit),
    "hf_vit_eager": _hf("ViTModel", "ViTConfig", oracle.hf_vit, attention="eager"),
    "hf_dinov2": _hf("Dinov2Model", "Dinov2Config", oracle.hf_dinov2),
    "hf_dinov2_swiglu": _hf(
        "Dinov2ForImageClassification",
        "Dinov2Config",
        oracle.hf_dinov2_classifier,
        use_swiglu_ffn=True,
        attention="eager",
    ),
    "hf_clip": _hf("CLIPVisionModel", "CLIPVisionConfig", oracle.hf_clip),
    "hf_clip_eager": _hf("CLIPVisionModel", "CLIPVisionConfig", oracle.hf_clip, attention="eager"),
    "hf_videomae": _hf("VideoMAEModel", "VideoMAEConfig", oracle.hf_videomae, use_mean_pooling=False, **_VIDEO),
    "hf_videomae_classifier": _hf(
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        oracle.hf_videomae_classifier,
        attention="eager",
        **_VIDEO,
    ),
    "torchvision_vit": Entry(
        lambda: torchvision.models.VisionTransformer(48, 8, 3, 4, 64, 128, num_classes=10),
        (3, 48, 48),
        oracle.torchvision_vit,
        1,
    ),
}
