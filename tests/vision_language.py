"""Vision-language models of transformers with random weights, as small as they come, and a prompt with one image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

IMAGE = 3  # the token that an image's features replace
_TEXT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 4,
    "image_size": 16,
}  # fmt: skip


class Case(NamedTuple):
    """A model of four vision layers, and where its tower stands.

    Args:
        inputs: prompts of two samples with an image each; of one for Qwen2.5-VL.
        options: what `optimize_tower` needs for it.
    """

    model: Any
    inputs: dict[str, Any]
    path: str
    options: dict[str, Any]


def _case(
    kind: Callable[[Any], nn.Module], config: Any, tokens: int, path: str, images: tuple[int, ...] = (2, 3, 16, 16)
) -> Case:
    """The model, and prompts with so many tokens for each image.

    Args:
        images: the shape of `pixel_values`.
    """
    torch.manual_seed(0)
    model = kind(config).eval().double()
    for p in model.parameters():  # far from the nearly constant features of an initialised model
        nn.init.normal_(p, std=0.2) if p.dim() > 1 else nn.init.normal_(p, 1.0, 0.1)
    ids = torch.randint(4, 48, (2, tokens + 5))
    ids[:, 2 : 2 + tokens] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(images).double()}
    return Case(model, inputs, path, {})


def llava() -> Case:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION), text_config={"model_type": "llama", **_TEXT}, image_token_index=IMAGE
    )
    return _case(LlavaForConditionalGeneration, config, 16, "model.vision_tower")


def internvl() -> Case:
    config = InternVLConfig(vision_config=_VISION, text_config={"model_type": "qwen2", **_TEXT}, image_token_id=IMAGE)
    return _case(InternVLForConditionalGeneration, config, 4, "model.vision_tower")


def paligemma() -> Case:
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_VISION},
        text_config={"model_type": "gemma", "head_dim": 16, **_TEXT},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return _case(PaliGemmaForConditionalGeneration, config, 16, "model.vision_tower")


def idefics3() -> Case:
    return _of_several(Idefics3ForConditionalGeneration, Idefics3Config)


def smolvlm() -> Case:
    return _of_several(SmolVLMForConditionalGeneration, SmolVLMConfig)


def _of_several(kind: Any, configuration: Any) -> Case:
    """Models that read several images a sample, [B, images, 3, H, W]."""
    config = configuration(
        vision_config=_VISION, text_config={"model_type": "llama", **_TEXT}, image_token_id=IMAGE, scale_factor=2
    )
    return _case(kind, config, 4, "model.vision_model", (2, 1, 3, 16, 16))


def qwen2_5_vl() -> Case:
    vision = {
        "depth": 4, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "window_size": 16, "fullatt_block_indexes": [0, 1, 2, 3],
    }  # fmt: skip
    text = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=48, vision_start_token_id=49
    )
    case = _case(Qwen2_5_VLForConditionalGeneration, config, 6, "model.visual", (24, 96))
    inputs = {name: value if name == "pixel_values" else value[:1] for name, value in case.inputs.items()}
    inputs |= {"image_grid_thw": torch.tensor([[1, 4, 6]]), "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}
    return case._replace(inputs=inputs, options={"constant_inputs": ("grid_thw",)})


CASES = (llava, internvl, paligemma, idefics3, smolvlm, qwen2_5_vl)
