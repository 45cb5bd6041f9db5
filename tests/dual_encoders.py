"""Small dual encoders of transformers with random weights, and their folders as save_pretrained makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPTokenizer

FRAMES = 4  # of the X-CLIP
CROP: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {**VISION, "num_hidden_layers": 1, "max_position_embeddings": 16}
MIT = {"mit_hidden_size": 24, "mit_intermediate_size": 48, "mit_num_hidden_layers": 1, "mit_num_attention_heads": 2}


def tokenizer() -> CLIPTokenizer:
    """Of single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def clip() -> Any:
    size = len(tokenizer())
    text = {**TEXT, "vocab_size": size, "eos_token_id": size - 1, "bos_token_id": size - 2, "pad_token_id": size - 1}
    torch.manual_seed(1)
    config = transformers.CLIPConfig(vision_config=VISION, text_config=text, projection_dim=24)
    return transformers.CLIPModel(config).eval()


def xclip() -> Any:
    torch.manual_seed(1)
    vision = {**VISION, **MIT, "num_hidden_layers": 3, "num_frames": FRAMES}
    text = {**TEXT, "vocab_size": len(tokenizer())}
    config = transformers.XCLIPConfig(
        vision_config=vision, text_config=text, projection_dim=24, prompt_layers=1, prompt_num_attention_heads=2
    )
    return transformers.XCLIPModel(config).eval()


def save(model: Any, processor: Any, folder: Path) -> None:
    for part in (model, tokenizer(), processor):
        part.save_pretrained(folder)
