"""Small convolutional networks by config, which can also be taken apart for pruning by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from oracle_cnn import Cut, Parts
from torch import Tensor, nn

BLOCKS = ("basic", "bottleneck", "depthwise")
HEADS = ("pool", "mean", "max")


@dataclass(frozen=True)
class Config:
    """A CNN; `strides[i]` stands before (`separate`) or in the first block of stage i."""

    block: str
    strides: tuple[int, ...]
    depths: tuple[int, ...]
    width: int
    size: tuple[int, int]
    kernel: int
    norm: str
    head: str
    separate: bool
    seed: int


class Norm(nn.Module):
    """LayerNorm over the channels of [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


def norm(kind: str, channels: int) -> nn.Module:
    return {"batch": nn.BatchNorm2d, "layer": Norm, "group": lambda c: nn.GroupNorm(2, c)}[kind](channels)


class Block(nn.Module):
    def __init__(self, c: Config, channels: int, out: int, stride: int) -> None:
        super().__init__()
        k, pad = c.kernel, c.kernel // 2
        if c.block == "basic":
            layers = [nn.Conv2d(channels, out, k, stride, pad), norm(c.norm, out), nn.ReLU()]
            layers += [nn.Conv2d(out, out, 3, 1, 2, dilation=2, groups=2), norm(c.norm, out)]
        elif c.block == "bottleneck":
            layers = [nn.Conv2d(channels, out // 2, 1), norm(c.norm, out // 2), nn.ReLU()]
            layers += [nn.Conv2d(out // 2, out // 2, k, stride, pad, groups=2), nn.ReLU()]
            layers += [nn.Conv2d(out // 2, out, 1), norm(c.norm, out)]
        else:
            layers = [nn.Conv2d(channels, channels, k, stride, pad, groups=channels), norm(c.norm, channels)]
            layers += [nn.Conv2d(channels, 2 * out, 1), nn.GELU(), nn.Conv2d(2 * out, out, 1)]
        self.branch = nn.Sequential(*layers)
        changes = stride > 1 or channels != out
        self.project = nn.Conv2d(channels, out, 1, stride) if changes else None
        self.last = nn.Identity() if c.block == "depthwise" else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.branch(x) + (x if self.project is None else self.project(x)))
        return out


class GeneratedCNN(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.config = config
        self.stem = nn.Sequential(nn.Conv2d(3, config.width, 3, padding=1), nn.ReLU())
        self.downs, self.stages = nn.ModuleList(), nn.ModuleList()
        channels = config.width
        for i, (stride, depth) in enumerate(zip(config.strides, config.depths, strict=True)):
            out = config.width * (1 + i)
            apart = config.separate and stride > 1
            down = nn.Sequential(norm(config.norm, channels), nn.Conv2d(channels, out, stride, stride))
            self.downs.append(down if apart else nn.Identity())
            first = Block(config, out if apart else channels, out, 1 if apart else stride)
            self.stages.append(nn.Sequential(first, *(Block(config, out, out, 1) for _ in range(depth - 1))))
            channels = out
        self.head = nn.Linear(channels, 3)

    def pooled(self, x: Tensor) -> Tensor:
        if self.config.head == "pool":
            x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        else:
            x = x.mean((-2, -1)) if self.config.head == "mean" else x.amax((2, 3))
        out: Tensor = self.head(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for down, stage in zip(self.downs, self.stages, strict=True):
            x = stage(down(x))
        return self.pooled(x)

    def images(self, batch: int) -> Tensor:
        return torch.randn(batch, 3, *self.config.size, generator=torch.Generator().manual_seed(self.config.seed + 1))


def parts(model: GeneratedCNN) -> Parts:
    stages = [(down, list(stage.children())) for down, stage in zip(model.downs, model.stages, strict=True)]
    return Parts(model.stem, stages, model.pooled, lambda block: block.project)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Two or three stages of a small image; sizes that strides do not divide are welcome."""
    block, stages = draw(st.sampled_from(BLOCKS)), draw(st.integers(2, 3))
    return Config(
        block=block,
        strides=(draw(st.integers(1, 2)), *(draw(st.integers(2, 3)) for _ in range(stages - 1))),
        depths=tuple(draw(st.integers(1, 2)) for _ in range(stages)),
        width=draw(st.sampled_from((4, 8))),
        size=draw(st.tuples(st.integers(18, 22), st.integers(18, 22))),
        kernel=draw(st.sampled_from((3, 5))),
        norm=draw(st.sampled_from(("batch", "layer", "group"))),
        head=draw(st.sampled_from(HEADS)),
        separate=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def cuts(draw: st.DrawFn, sizes: list[tuple[int, int]]) -> dict[int, Cut]:
    """Cuts for stages of these sizes before any cut; the later ones kept small enough to fit after the earlier."""
    chosen = {0, draw(st.integers(0, len(sizes) - 1))}
    found = {}
    for i in sorted(chosen):
        most = [size // (4 if i else 2) for size in sizes[i]]
        mode = draw(st.sampled_from(("line", "token")))
        found[i] = Cut(
            draw(st.integers(0, most[0])),
            draw(st.integers(0, most[1])),
            mode,
            draw(st.sampled_from(("together", "rows-first"))),
            draw(st.sampled_from(("shortcut", "sum"))),
        )
    return found
