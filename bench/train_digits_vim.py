"""Trains the Vision Mamba of table 7's digits row: `python -m bench.train_digits_vim --out FILE`.

Data, augmentation and recipe are those of `bench.train_digits`; no token is pruned or dropped.
"""

from __future__ import annotations

import torch
from timm.layers import build_sincos2d_pos_embed
from torch import nn

from bench.models.digits_vim import digits_vim
from bench.train_digits import main


def new_model() -> nn.Module:
    """An untrained model with 2-D sines as positions."""
    model = digits_vim()
    patches, width = model.pos_embed.shape[1] - 1, model.pos_embed.shape[2]
    side = round(patches**0.5)
    sines = 0.2 * build_sincos2d_pos_embed([side, side], dim=width)
    with torch.no_grad():
        model.pos_embed[0, torch.arange(patches + 1) != model.middle] = sines
    return model


if __name__ == "__main__":
    main(new_model, epochs=30)
