"""Inputs for the encoders of transformers, as their processors make them: keyword arguments, masks with padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Inputs = Callable[[int], Mapping[str, Any]]
SENTENCE = 22


def noise(*shape: int) -> Tensor:
    """Normally distributed, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def text(batch: int) -> dict[str, Tensor]:
    """Sentences of several lengths that end in token 110, padded on the right by token 1."""
    ids = torch.randint(5, 100, (batch, SENTENCE), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(batch, SENTENCE, dtype=torch.int64)
    for i in range(batch):
        length = SENTENCE - 3 * ((i + 1) % 3)
        ids[i, length - 1], ids[i, length:], mask[i, length:] = 110, 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def native(name: str, patch: int, temporal: int = 2, **more: Any) -> Inputs:
    """The patches of one image, a sequence without a batch, and the grid that they come from."""

    def make(_: int) -> Mapping[str, Any]:
        return {name: noise(64, 3 * temporal * patch * patch), "grid_thw": torch.tensor([[1, 8, 8]]), **more}

    return make


def _patches(batch: int) -> Mapping[str, Any]:
    """Patches of images of several shapes, padded to 64."""
    shapes = torch.tensor([[8, 8], [6, 9], [7, 7]])[torch.arange(batch) % 3]
    mask = (torch.arange(64) < shapes.prod(1, keepdim=True)).long()
    return {"pixel_values": noise(batch, 64, 192), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _boxes(batch: int) -> Mapping[str, Any]:
    """Text, and where on its page of 64 x 64 each word stands."""
    corner = (torch.arange(SENTENCE)[:, None] * torch.tensor([2, 1])).repeat(batch, 1, 1)
    return {**text(batch), "bbox": torch.cat([corner, corner + 5], 2)}


def mel(batch: int, bins: int = 16, length: int = 80) -> Mapping[str, Any]:
    return {"input_features": noise(batch, bins, length)}


def frames(batch: int, bins: int = 16, length: int = 80) -> Mapping[str, Any]:
    return {"input_features": noise(batch, length, bins)}


def video(batch: int) -> Mapping[str, Any]:
    return {"pixel_values": noise(batch, 4, 3, 64, 64)}


BY_NAME: dict[str, Inputs] = {  # by a model's main input
    "pixel_values": lambda batch: {"pixel_values": noise(batch, 3, 64, 64)},
    "pixel_values_videos": lambda batch: {"pixel_values_videos": noise(batch, 4, 3, 64, 64)},
    "input_ids": text,
    "input_values": lambda batch: {"input_values": noise(batch, 1500)},
    "input_features": mel,
}
_IMAGE = BY_NAME["pixel_values"]

BY_FAMILY: dict[str, Inputs] = {
    "clip": lambda batch: {**text(batch), **_IMAGE(batch)},
    "vit_mae": lambda batch: {**_IMAGE(batch), "noise": noise(batch, 64)},  # decides which patches it sees
    "vjepa2": lambda batch: {"pixel_values_videos": noise(batch, 4, 3, 64, 64), "skip_predictor": True},
    **dict.fromkeys(("videomae", "vivit", "timesformer"), video),
    **dict.fromkeys(
        (
            "got_ocr2_vision", "deepseek_ocr2_sam_vision_model", "unlimited_ocr_sam_vision_model", "idefics2_vision",
            "idefics3_vision", "smolvlm_vision", "llama4_vision_model", "ovis2_vision", "molmo2_vision",
            "granite_docling_vision", "step3p5_vision", "bridgetower_vision_model", "inkling_vision",
        ),
        _IMAGE,
    ),
    **dict.fromkeys(("wav2vec2-bert", "lasr_encoder", "parakeet_encoder", "speech_to_text", "gemma4_audio"), frames),
    **dict.fromkeys(
        (
            "qwen2_5_vl_vision", "qwen2_vl_vision", "glm4v_vision", "qwen3_vl_vision", "qwen3_5_vision",
        ),
        native("hidden_states", 8),
    ),
    "pixtral": lambda _: _IMAGE(1),  # several are one sequence, kept apart by a mask
    "siglip2_vision_model": _patches,
    "audio-spectrogram-transformer": lambda batch: {"input_values": noise(batch, 64, 32)},
    "omniasr_audio": lambda batch: {"input_values": noise(batch, 1, 1500)},
    "clap_audio_model": lambda batch: {"input_features": noise(batch, 1, 256, 16)},
    "xclip_vision_model": lambda batch: {"pixel_values": noise(2 * batch, 3, 64, 64)},
    "mllama_vision_model": lambda batch: {
        "pixel_values": noise(batch, 1, 2, 3, 64, 64),
        "aspect_ratio_ids": torch.full((batch, 1), 2),
        "aspect_ratio_mask": torch.ones(batch, 1, 2, dtype=torch.int64),
    },
    "pix2struct_vision_model": lambda batch: {"flattened_patches": _flattened(batch)},
    "kosmos_2_5_vision_model": lambda batch: {"flattened_patches": _flattened(batch)},
    "perceiver": lambda batch: {"inputs": noise(batch, 30, 48)},
    "layoutlm": _boxes,
    "layoutlmv3": _boxes,
    "lilt": _boxes,
    "clvp_encoder": text,
    # their maps end in 7 x 7
    **dict.fromkeys(
        (
            "convnext", "convnextv2", "dinov3_convnext", "efficientnet", "align_vision_model", "mobilenet_v1",
            "mobilenet_v2", "pp_lcnet", "pp_lcnet_v3", "textnet", "upernet",
        ),
        lambda batch: {"pixel_values": noise(batch, 3, 224, 224)},
    ),
    # a cache has no place in a graph
    "mamba": lambda batch: {**text(batch), "use_cache": False},
    "mamba2": lambda batch: {**text(batch), "use_cache": False},
    "voxtral_realtime_encoder": lambda batch: {**mel(batch), "use_cache": False},
    "levit": lambda batch: {"pixel_values": noise(batch, 3, 128, 128)},
}  # fmt: skip


def _flattened(batch: int) -> Tensor:
    """Patches with their row and column in front, the last ones padding."""
    rows, columns = (torch.arange(40) // 6 + 1).float(), (torch.arange(40) % 6 + 1).float()
    patches = torch.cat([torch.stack([rows, columns], 1).expand(batch, -1, -1), noise(batch, 40, 48)], 2)
    return patches * (torch.arange(40) < 36)[:, None]
