"""The models whose launches are counted: a transformer of four blocks and a small residual CNN."""

from __future__ import annotations

from fake_gpu import on_cuda
from generated import Config, GeneratedViT
from timm.models.resnet import BasicBlock, ResNet
from torch import float16
from torch.fx import GraphModule

from rs_compile import Schedule

DEPTH, WIDTH, HEADS = 4, 384, 6
SITES = (0, 1, 2)  # blocks after which tokens leave


def transformer(tokens: int, schedule: Schedule) -> GraphModule:
    """fp16, one class token in front of a square of patches."""
    side = int((tokens - 1) ** 0.5)
    config = Config(depth=DEPTH, width=WIDTH, heads=HEADS, grid=(side, side), prefix=1)
    assert config.tokens == tokens
    return on_cuda(GeneratedViT(config), (3, 2 * side, 2 * side), float16, schedule)


def cnn(schedule: Schedule) -> GraphModule:
    """fp16, stages of 56, 28 and 14 rows and columns."""
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10).eval()
    return on_cuda(model, (3, 224, 224), float16, schedule)
