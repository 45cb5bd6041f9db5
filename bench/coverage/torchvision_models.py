"""Classifiers of torchvision, of images and of videos: one of every architecture, small, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.swin_transformer import SwinTransformer3d

from bench.coverage.subject import Subject

_OTHER_TASKS = ("segmentation", "detection", "optical_flow", "quantization")


def _mvit(queries: bool) -> nn.Module:
    """Four blocks, the third of which pools its queries; v2 pools and adds with relative positions."""
    blocks = [
        MSBlockConfig(1, 16, 16, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        MSBlockConfig(1, 16, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
        MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 1, 1]),
    ]
    return MViT((64, 64), 4, blocks, queries, queries, queries, queries, num_classes=10)


_SWIN: dict[str, Any] = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 10}
_IMAGE, _VIDEO = (3, 64, 64), (3, 4, 64, 64)

# where the smallest model of the library is large, or its usual input is
_SMALL: dict[str, Callable[[], nn.Module]] = {
    "densenet": lambda: torchvision.models.DenseNet(16, (2, 2, 2, 2), 16, num_classes=10),
    "googlenet": lambda: torchvision.models.googlenet(init_weights=False, aux_logits=False),
    "inception": lambda: torchvision.models.inception_v3(init_weights=False, aux_logits=False),
    "maxvit": lambda: MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 16, 0.0, num_classes=10),
    "swin_transformer": lambda: SwinTransformer([4, 4], window_size=[4, 4], **_SWIN),
    "swin_transformer_v2": lambda: SwinTransformer(
        [4, 4], window_size=[4, 4], block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2, **_SWIN
    ),
    "vision_transformer": lambda: torchvision.models.VisionTransformer(64, 8, 4, 4, 48, 96, num_classes=10),
    "video.mvit": lambda: _mvit(False),
    "video.mvit_v2": lambda: _mvit(True),
    "video.swin_transformer": lambda: SwinTransformer3d([2, 4, 4], window_size=[2, 4, 4], **_SWIN),
}
_SHAPES = {"inception": (3, 96, 96), "video.s3d": (3, 14, 224, 224)}


def families() -> dict[str, str]:
    """By module of torchvision.models one of its models, the first by name."""
    found: dict[str, str] = {}
    for name in sorted(torchvision.models.list_models(), key=lambda n: (len(n), n)):
        module = torchvision.models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        if not module.startswith(_OTHER_TASKS):
            found.setdefault(module, name)
    return found | {"swin_transformer_v2": "swin_v2_t", "video.mvit_v2": "mvit_v2_s"}


def subjects() -> Iterator[Subject]:
    """One subject for each architecture: the smallest of torchvision's, or a smaller one of its class."""
    for family, name in sorted(families().items()):
        build = _SMALL.get(family) or partial(torchvision.models.get_model, name, weights=None)
        shape = _SHAPES.get(family) or (_VIDEO if family.startswith("video.") else _IMAGE)
        yield Subject("torchvision", family, name, partial(_eval, build), partial(_inputs, shape))


def _eval(build: Callable[[], nn.Module]) -> nn.Module:
    return build().eval()


def _inputs(shape: tuple[int, ...], batch: int) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
