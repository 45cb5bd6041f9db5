"""Rows and columns pruned by hand: a CNN's own modules run one after another, lines and cells taken out in loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """What leaves after a stage; the fields are those of `rs_compile.GridPrune`."""

    rows: int
    columns: int
    mode: str = "line"
    order: str = "together"
    against: str = "shortcut"


@dataclass
class Parts:
    """A CNN taken apart.

    Args:
        stem: images to the first stage's input.
        stages: for each a module that comes before its blocks (or None) and the blocks.
        head: the last stage's output to the model's.
        projection: the shortcut module of a block, None where the shortcut is its input.
    """

    stem: Callable[[Tensor], Tensor]
    stages: Sequence[tuple[Callable[[Tensor], Tensor] | None, Sequence[nn.Module]]]
    head: Callable[[Tensor], Tensor]
    projection: Callable[[Any], nn.Module | None]


@dataclass
class Walked:
    """The model's output, each stage's output before its cut, and how clearly the kept cells won."""

    output: Tensor
    stages: list[Tensor] = field(default_factory=list)
    margin: float = float("inf")


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - b.float()).pow(2).sum(1).sqrt()


def best(scores: Sequence[float], keep: int) -> tuple[list[int], float]:
    """Positions of the highest scores in order, of equal ones the earlier; the relative gap to the best that left."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    gap = float("inf")
    if keep < len(scores):
        gap = (scores[ranked[keep - 1]] - scores[ranked[keep]]) / max(abs(scores[ranked[0]]), 1e-30)
    return sorted(ranked[:keep]), gap


def cells(score: Tensor, cut: Cut) -> tuple[list[list[tuple[int, int]]], float]:
    """For one sample's scores [H, W]: row and column of each cell of the smaller map; and the smallest gap."""
    height, width = score.shape
    keep_rows, keep_columns = height - cut.rows, width - cut.columns
    if cut.mode == "line":
        rows, gap = best(score.mean(1).tolist(), keep_rows)
        seen = score[rows] if cut.order == "rows-first" else score
        columns, gap2 = best(seen.mean(0).tolist(), keep_columns)
        return [[(r, c) for c in columns] for r in rows], min(gap, gap2)
    gaps = []
    table = []
    for r in range(height):
        kept, gap = best(score[r].tolist(), keep_columns)
        table.append([(r, c) for c in kept])
        gaps.append(gap)
    chosen = []
    for j in range(keep_columns):
        kept, gap = best([score[table[r][j]].item() for r in range(height)], keep_rows)
        chosen.append([table[r][j] for r in kept])
        gaps.append(gap)
    return [[chosen[j][i] for j in range(keep_columns)] for i in range(keep_rows)], min(gaps)


def cut_map(x: Tensor, score: Tensor, cut: Cut) -> tuple[Tensor, float]:
    """[B, C, H, W] without the cells that leave, cell by cell."""
    samples, gaps = [], []
    for one, s in zip(x, score.detach(), strict=True):
        table, gap = cells(s, cut)
        samples.append(torch.stack([torch.stack([one[:, r, c] for r, c in line], 1) for line in table], 1))
        gaps.append(gap)
    return torch.stack(samples), min(gaps)


def walk(parts: Parts, images: Tensor, cuts: Mapping[int, Cut]) -> Walked:
    """The model with rows and columns taken out after the stages of `cuts`."""
    walked = Walked(images)
    x = parts.stem(images)
    for i, (before, blocks) in enumerate(parts.stages):
        x = x if before is None else before(x)
        outputs, shortcuts = [], []
        for block in blocks:
            shortcut = [x]
            projection = parts.projection(block)
            # called once only, for its batch norm counts
            hooks = (
                []
                if projection is None
                else [projection.register_forward_hook(lambda *a, to=shortcut: to.append(a[2]))]
            )
            x = block(x)
            for hook in hooks:
                hook.remove()
            outputs.append(x)
            shortcuts.append(shortcut[-1])
        walked.stages.append(x)
        if (cut := cuts.get(i)) is not None:
            pairs = {
                "shortcut": [(x, shortcuts[0])],
                "first-block": [(x, outputs[0])],
                "sum": list(zip(outputs, shortcuts, strict=True)),
            }[cut.against]
            x, gap = cut_map(x, torch.stack([distance(a, b) for a, b in pairs]).sum(0), cut)
            walked.margin = min(walked.margin, gap)
    walked.output = parts.head(x)
    return walked


def _down(block: Any) -> nn.Module | None:
    return block.downsample if isinstance(getattr(block, "downsample", None), nn.Module) else None


def torchvision_resnet(m: Any) -> Parts:
    """ResNet and ResNeXt."""
    return Parts(
        lambda x: m.maxpool(m.relu(m.bn1(m.conv1(x)))),
        [(None, layer) for layer in (m.layer1, m.layer2, m.layer3, m.layer4)],
        lambda x: m.fc(m.avgpool(x).flatten(1)),
        _down,
    )


def timm_resnet(m: Any) -> Parts:
    return Parts(
        lambda x: m.maxpool(m.act1(m.bn1(m.conv1(x)))),
        [(None, layer) for layer in (m.layer1, m.layer2, m.layer3, m.layer4)],
        m.forward_head,
        _down,
    )


def torchvision_regnet(m: Any) -> Parts:
    return Parts(
        m.stem,
        [(None, stage) for stage in m.trunk_output],
        lambda x: m.fc(m.avgpool(x).flatten(1)),
        lambda block: block.proj if isinstance(block.proj, nn.Module) else None,
    )


def timm_regnet(m: Any) -> Parts:
    return Parts(
        m.stem,
        [(None, list(stage.children())) for stage in (m.s1, m.s2, m.s3, m.s4)],
        lambda x: m.forward_head(m.final_conv(x)),
        _down,
    )


def torchvision_convnext(m: Any) -> Parts:
    f = m.features
    stages = [(f[i - 1] if i > 1 else None, f[i]) for i in range(1, len(f), 2)]
    return Parts(f[0], stages, lambda x: m.classifier(m.avgpool(x)), lambda block: None)


def timm_convnext(m: Any) -> Parts:
    stages = [(stage.downsample, stage.blocks) for stage in m.stages]
    return Parts(m.stem, stages, lambda x: m.forward_head(m.norm_pre(x)), lambda block: None)


@torch.no_grad()
def lively(model: nn.Module, images: Tensor) -> nn.Module:
    """Random weights, norms and layer scales, then batch norm statistics that fit, so that no branch is near zero."""
    generator = torch.Generator().manual_seed(0)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for name, p in model.named_parameters():
        if p.numel() == max(p.shape):  # one number a channel
            is_weight = name.rsplit(".", 1)[-1] in ("weight", "gamma", "layer_scale")
            p.copy_((1.0 if is_weight else 0.0) + 0.3 * torch.randn(p.shape, generator=generator))
        else:
            p.copy_(1.5 * torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5)
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    model.train()(images)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return model.eval()
