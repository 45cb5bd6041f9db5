"""From a video file to the pixels that UMT's vision encoder wants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.evaluate.frames import padded_frames

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def prepared(frames: Tensor, side: int) -> Tensor:
    """Frames as UMT resizes and normalises them.

    The whole frame becomes side x side, whatever its shape: bicubically without antialiasing, clamped and rounded back
    to whole levels, as torchvision 0.13 resized tensors.

    Args:
        frames: uint8 [T, H, W, 3].

    Returns:
        float32 [T, 3, side, side].
    """
    pixels = frames.permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels, (side, side), mode="bicubic", align_corners=False, antialias=False)
    pixels = pixels.clamp(0, 255).round() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


@dataclass(frozen=True)
class Clips:
    """The clip of an index, float32 [3, T, side, side].

    Args:
        folder, files: the videos.
        frames, side: of a clip.
        seconds: see `padded_frames`.
    """

    folder: Path
    files: tuple[str, ...]
    frames: int
    side: int
    seconds: int | None = None

    def __call__(self, index: int) -> Tensor:
        frames = padded_frames(self.folder / self.files[index], self.frames, self.seconds)
        return prepared(frames, self.side).transpose(0, 1)
