"""Dual encoders for retrieval: CLIP-style and X-CLIP models of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from bench.evaluate.journal import EvaluationError

Transform = Callable[[Tensor], Tensor]


class TextTower(nn.Module):
    """The text side of a model of transformers.

    Args:
        model: with `get_text_features`.
        tokenizer: the model's; texts are padded and cut to the length that the model was made for.
    """

    tower = "model.vision_model"  # what `with_vision` replaces

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer = tokenizer

    def encode_texts(self, texts: list[str]) -> Tensor:
        """B texts -> features [B, D]."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        features: Tensor = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
        return features


class ClipEncoder(TextTower):
    """A CLIP-style image model (CLIP, SigLIP, ...) on videos: the mean of its frames' normalised features.

    That is the parameter-free mean pooling of CLIP4Clip (Luo et al., 2021).
    """

    def encode_videos(self, frames: Tensor) -> Tensor:
        """Frames [B, T, 3, H, W] -> features [B, D]."""
        features: Tensor = self.model.get_image_features(pixel_values=frames.flatten(0, 1)).pooler_output
        return F.normalize(features, dim=-1).view(*frames.shape[:2], -1).mean(1)


class XClipEncoder(TextTower):
    """X-CLIP, whose frames exchange messages in every block.

    Its prompts, which change the features of a text with the video that it is compared to, are left out: a dual
    encoder has one feature vector a text.
    """

    def encode_videos(self, frames: Tensor) -> Tensor:
        """Frames [B, T, 3, H, W] -> features [B, D]; T is the model's."""
        wanted = self.model.config.vision_config.num_frames
        if frames.shape[1] != wanted:
            raise EvaluationError(
                f"this X-CLIP model takes {wanted} frames, not {frames.shape[1]}; pass --frames {wanted}"
            )
        features: Tensor = self.model.get_video_features(pixel_values=frames).pooler_output
        return features


Encoder = TypeVar("Encoder", TextTower, ClipEncoder, XClipEncoder)


def with_vision(encoder: Encoder, make: Callable[[nn.Module], nn.Module]) -> Encoder:
    """The encoder with `make(its vision tower)` in that place; everything else is shared with it.

    Args:
        encoder: is not changed.
        make: for example `lambda tower: rs_compile.optimize(tower, schedule)`.
    """
    *path, last = encoder.tower.split(".")
    copied = holder = _shallow(encoder)
    for name in path:
        setattr(holder, name, _shallow(getattr(holder, name)))
        holder = getattr(holder, name)
    setattr(holder, last, make(getattr(holder, last)))
    return copied


def _shallow(module: Any) -> Any:
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


@dataclass(frozen=True)
class Processor:
    """A video's frames, uint8 [T, H, W, 3], through an image or video processor of transformers -> [T, 3, h, w]."""

    processor: Any

    def __call__(self, frames: Tensor) -> Tensor:
        pixels: Tensor = self.processor(list(frames.permute(0, 3, 1, 2)), return_tensors="pt")["pixel_values"]
        return pixels.view(len(frames), *pixels.shape[-3:])


def load_encoder(
    path: str, *, pretrained: bool = False, random_weights: bool = False
) -> tuple[ClipEncoder | XClipEncoder, Transform]:
    """A dual encoder of transformers, in eval mode, fp32, and the transform of its frames.

    Args:
        path: a folder as `save_pretrained` makes it: configuration, weights, tokenizer and image processor.
            With `pretrained`, a model of the hub may be named.
        pretrained: the hub may be asked; otherwise nothing but local files is read.
        random_weights: only the configuration is read, the weights are random (the same each time).

    Raises:
        EvaluationError: what cannot be had, or a model that is no dual encoder. Code in the folder never runs.
    """
    options: dict[str, Any] = {"local_files_only": not pretrained, "trust_remote_code": False}
    if not (pretrained or Path(path).is_dir()):
        raise EvaluationError(
            f"there is no folder {path}; give one as transformers' save_pretrained makes it, or pass --pretrained to "
            "ask the hub"
        )
    absent: list[str] = []
    try:
        config = transformers.AutoConfig.from_pretrained(path, **options)
        if random_weights:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = transformers.AutoModel.from_config(config, trust_remote_code=False)
        else:
            model, loaded = transformers.AutoModel.from_pretrained(
                path, config=config, output_loading_info=True, **options
            )
            absent = sorted(loaded["missing_keys"])
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        processor = transformers.AutoImageProcessor.from_pretrained(path, **options)
    except Exception as error:  # transformers, its hub client and the readers of weights each have their own
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EvaluationError(
            f"the dual encoder {path} cannot be loaded: {first}\n  way out: give a folder with configuration, weights, "
            f"tokenizer and image processor, as save_pretrained makes them"
        ) from error
    if absent:  # transformers would start them at random
        raise EvaluationError(
            f"the weights in {path} are not those of a {type(model).__name__}: {len(absent)} are missing, first "
            f"{absent[0]}; give the folder that the model was saved to"
        )
    if not (hasattr(model, "get_text_features") and hasattr(model, "vision_model")):
        raise EvaluationError(
            f"{path} is a {type(model).__name__}, no dual encoder; give CLIP, SigLIP, X-CLIP or the like"
        )
    kind = XClipEncoder if hasattr(model, "get_video_features") else ClipEncoder
    return kind(model, tokenizer).eval(), Processor(processor)
