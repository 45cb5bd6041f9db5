"""The families that the support matrix is about: a small model of each, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from bench.coverage import transformers_models
from bench.models.umt import Size, VisionEncoder
from bench.models.vim import VisionMamba


@dataclass(frozen=True)
class Family:
    """One row of the matrix.

    Args:
        name: as people call it.
        model: what stands for it, with its library.
        build: makes it, in eval mode.
        inputs: makes its inputs for a number of samples: a tensor [B, ...] or keyword arguments.
    """

    name: str
    model: str
    build: Callable[[], nn.Module] = field(repr=False)
    inputs: Callable[[int], Tensor | Mapping[str, Any]] = field(repr=False)


def families() -> list[Family]:
    """All rows, in the order of the page."""
    return [
        _timm("DeiT, ViT", "deit_tiny_patch16_224", depth=4, embed_dim=48, num_heads=4),
        _transformers("DINOv2", "dinov2"),
        _transformers("CLIP, image tower", "clip_vision_model"),
        _transformers("SigLIP, image tower", "siglip_vision_model"),
        # transformers' default is without the position bias that all checkpoints have
        _timm("BEiT", "beit_base_patch16_224", depth=4, embed_dim=48, num_heads=4),
        _timm("EVA-02", "eva02_tiny_patch14_224", depth=4, embed_dim=48, num_heads=4, img_size=56),
        _timm(
            "Swin",
            "swin_tiny_patch4_window7_224",
            img_size=224,
            embed_dim=24,
            depths=(1, 1, 1, 2),
            num_heads=(1, 2, 4, 8),
        ),
        _transformers("SAM, image encoder", "sam_vision_model"),
        _transformers("VideoMAE", "videomae"),
        Family("UMT", "bench.models.umt", _umt, partial(_noise, 3, 2, 64, 64)),
        Family("Vision Mamba", "bench.models.vim", _vim, partial(_noise, 3, 32, 32)),
        _timm("MLP-Mixer", "mixer_s16_224"),
        _transformers("ResNet", "resnet"),
        _transformers("ConvNeXt", "convnext"),
    ]


def _timm(title: str, name: str, **options: Any) -> Family:
    side = options.get("img_size", 64)
    build = partial(timm.create_model, name, num_classes=5, **{"img_size": side, **options})
    return Family(title, f"timm {name}", lambda: build().eval(), partial(_noise, 3, side, side))


def _transformers(title: str, kind: str) -> Family:
    """The small model of the coverage run."""
    name = f"transformers {transformers_models.class_name(kind)}"
    return Family(title, name, partial(transformers_models.build, kind), partial(transformers_models.inputs, kind))


def _umt() -> nn.Module:
    return VisionEncoder(Size(48, 4, 4), 2, 64, pool_norm=True, attention="eager").eval()


def _vim() -> nn.Module:
    return VisionMamba(32, patch=8, classes=5, dim=16, depth=4).eval()


def _noise(*sizes_and_batch: int) -> Tensor:
    *sizes, batch = sizes_and_batch
    return torch.randn(batch, *sizes, generator=torch.Generator().manual_seed(0))
