"""Models of open_clip: image and text together, towers alone; shrunk through their configs, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from bench.coverage.subject import Subject

_WORDS = 16
_TEXT: dict[str, Any] = {"context_length": _WORDS, "vocab_size": 120, "width": 40, "heads": 4, "layers": 4}
_VISION: dict[str, Any] = {"image_size": 64, "layers": 4, "width": 48, "head_width": 12, "patch_size": 8}
_DECODER: dict[str, Any] = {"context_length": _WORDS, "width": 40, "heads": 4, "layers": 2, "vocab_size": 120}

# by model of open_clip what makes its image tower small; a timm tower takes the smallest of its own kind
_SMALL: dict[str, dict[str, Any]] = {
    "ViT-B-32": _VISION,
    "ViT-B-32-quickgelu": _VISION,
    "ViT-H-14-CLIPA": _VISION,
    "coca_ViT-B-32": {**_VISION, "attn_pooler_heads": 4},
    "RN50": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
    "ViT-B-16-SigLIP": {"timm_model_name": "vit_tiny_patch16_224"},
    "ViT-B-16-SigLIP2": {"timm_model_name": "vit_tiny_patch16_224"},
    "EVA02-B-16": {"timm_model_name": "eva02_tiny_patch14_224"},
    "PE-Core-B-16": {"image_size": 384, "timm_model_name": "vit_pe_core_tiny_patch16_384"},
    "MobileCLIP-B": {},
    "MobileCLIP2-S0": {"image_size": 64},
    "convnext_base": {"image_size": 64, "timm_model_name": "convnext_atto"},
    "swin_base_patch4_window7_224": {"timm_model_name": "swin_tiny_patch4_window7_224"},
    "vit_medium_patch16_gap_256": {},
    "vit_relpos_medium_patch16_cls_224": {},
    "ViTamin-S": {},
}
_ALONE = ("ViT-B-32", "ViT-B-16-SigLIP", "ViT-H-14-CLIPA")  # these also as a tower of images and one of text


def subjects() -> Iterator[Subject]:
    """Each model with image and text; of some also the image tower, and the text tower, alone."""
    for name in open_clip.list_models():
        if name not in _SMALL:
            continue
        yield Subject("open_clip", name, name, partial(_model, name), partial(_both, name))
        if name in _ALONE:
            yield Subject(
                "open_clip", f"{name} image", f"{name} image", partial(_image_tower, name), partial(_images, name)
            )
            yield Subject("open_clip", f"{name} text", f"{name} text", partial(_text_tower, name), _text)


def _model(name: str) -> nn.Module:
    """As `open_clip.create_model` builds it, from the smaller config."""
    config = open_clip.get_model_config(name)
    config["vision_cfg"] |= _SMALL[name]
    config["text_cfg"] |= _TEXT
    config["embed_dim"] = 40
    kind: Callable[..., nn.Module] = CustomTextCLIP if config.pop("custom_text", False) else CLIP
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= _DECODER | {"attn_pooler_heads": 4}
        kind = open_clip.CoCa
    return kind(**config).eval()


def _image_tower(name: str) -> nn.Module:
    return _model(name).get_submodule("visual")


class _TextTower(nn.Module):
    """A model that reads text only, by its method `encode_text`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model  # an open_clip model of whatever class

    def forward(self, text: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(text)
        return features


def _text_tower(name: str) -> nn.Module:
    return _TextTower(_model(name)).eval()


def _images(name: str, batch: int) -> Tensor:
    size = (open_clip.get_model_config(name)["vision_cfg"] | _SMALL[name])["image_size"]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def _text(batch: int) -> Tensor:
    """Sentences of several lengths that begin and end in tokens of their own, then zeros, as the tokenizer makes."""
    text = torch.randint(5, 100, (batch, _WORDS), generator=torch.Generator().manual_seed(0))
    for i in range(batch):
        length = _WORDS - 3 * (i % 3)
        text[i, 0], text[i, length - 1], text[i, length:] = 118, 119, 0
    return text


def _both(name: str, batch: int) -> Mapping[str, Tensor]:
    return {"image": _images(name, batch), "text": _text(batch)}
