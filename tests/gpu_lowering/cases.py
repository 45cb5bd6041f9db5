"""The models whose launches are counted: a transformer of four blocks and a small residual CNN."""

from __future__ import annotations

from typing import Literal

from generated import Config, GeneratedViT
from timm.models.resnet import BasicBlock, ResNet
from torch import empty, float16
from torch.fx import GraphModule

from bench.gpu.lowering import on_cuda
from passes.sites.mergers import MERGERS
from rs_compile import GridPrune, Schedule

DEPTH, WIDTH, HEADS = 4, 384, 6
SITES = (0, 1, 2)  # blocks after which tokens leave


def kept() -> Schedule:
    """Of 577 tokens more than 512 reach the last site."""
    return Schedule(keep=dict.fromkeys(SITES, 0.95))


def merged(merger: str = "stream") -> Schedule:
    return Schedule(merge=dict.fromkeys(SITES, 0.1), by=MERGERS[merger]())


def cut(mode: Literal["line", "token"]) -> Schedule:
    """Whole rows and columns, or cells of each."""
    return Schedule(grid=dict.fromkeys(SITES, GridPrune(rows=2, columns=2, mode=mode)))


def transformer(tokens: int, schedule: Schedule, samples: int = 2, drop_unread: bool = False) -> GraphModule:
    """fp16, one class token in front of a square of patches."""
    side = int((tokens - 1) ** 0.5)
    config = Config(depth=DEPTH, width=WIDTH, heads=HEADS, grid=(side, side), prefix=1)
    assert config.tokens == tokens
    images = empty(samples, 3, 2 * side, 2 * side)
    return on_cuda(GeneratedViT(config), images, float16, schedule, drop_unread=drop_unread)


def cnn(tokens: int, schedule: Schedule, samples: int = 2) -> GraphModule:
    """fp16, on the images of which patches of 16 x 16 make so many tokens: 224 or 384 rows and columns."""
    side = 16 * int((tokens - 1) ** 0.5)
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10).eval()
    return on_cuda(model, empty(samples, 3, side, side), float16, schedule)
