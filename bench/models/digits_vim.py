"""A Vision Mamba small enough to be trained on the handwritten digits in minutes; its weights come along."""

from __future__ import annotations

from pathlib import Path

from bench.digits import SIDE
from bench.models.vim import VisionMamba
from rs_compile.models import load_checkpoint

WEIGHTS = Path(__file__).parents[1] / "data" / "digits_vim.safetensors"


def digits_vim() -> VisionMamba:
    """Untrained: [B, 1, 40, 40] -> logits [B, 10]; 65 tokens, the class token 33rd, width 48, 6 layers."""
    return VisionMamba(SIDE, patch=5, channels=1, classes=10, dim=48, depth=6)


def load_pretrained_digits_vim() -> VisionMamba:
    """`digits_vim` in eval mode, as `bench/train_digits_vim.py` trained it, without any pruning."""
    model = digits_vim()
    load_checkpoint(model, WEIGHTS)
    return model.eval()
