"""Where each op puts rows and columns, and what it refuses; x is [B, 4, 10, 7]."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from graphs import first_input, graph_of, leaves
from torch import Tensor
from torch.nn import functional as F

from passes.axes.grid import Grid, follow_grid
from passes.graph.base import Refusal

F0 = Fraction(0)


def x() -> Tensor:
    return torch.randn(2, 4, 10, 7)


def grid_of(f: Callable[[Tensor], Any]) -> Grid | None:
    gm = graph_of(f, x())
    found: Grid | None = follow_grid(first_input(gm)).grid(leaves(gm)[0])
    return found


SIDE = torch.randn(1, 4, 10, 7)
CHANNELS = torch.randn(1, 4, 1, 1)
SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "two maps": lambda x: x.sigmoid() * x,
    "channels": lambda x: x * CHANNELS + 1,
    "batch norm": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
    "1x1": lambda x: F.conv2d(x, torch.ones(3, 4, 1, 1)),
    "layer norm between permutes": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), [4]).permute(0, 3, 1, 2),
    "linear between transposes": lambda x: F.linear(x.transpose(1, 3), torch.ones(4, 4)).transpose(1, 3),
    "cat": lambda x: torch.cat([x, x.relu()], 1),
    "cat from before": lambda x: torch.cat([x, SIDE.expand(x.shape[0], -1, -1, -1)], 1),
    "split": lambda x: x.split([1, 3], 1)[1] + x.chunk(4, 1)[0],
    "half the channels": lambda x: x[:, :2],
    "more channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "a side input": lambda x: x + SIDE,
    "hard swish": F.hardswish,
    "learned slopes": lambda x: F.prelu(x, torch.ones(4)),
    "channels the other way round": lambda x: x.flip(1).roll(1, 1),
    "some channels": lambda x: x[:, [0, 2]].index_select(1, torch.tensor([1, 0])),
    "narrowed": lambda x: x.narrow(1, 1, 2),
    "in thirds": lambda x: x.tensor_split(3, 1)[1],
    "there and back": lambda x: x.movedim(1, -1).mT.swapaxes(1, 3).movedim((0, 1, 2, 3), (0, 3, 1, 2)),
    "a dimension more": lambda x: x.unsqueeze(1).relu().squeeze(1),
    "stacked": lambda x: torch.stack([x, x.relu()], 1)[:, 1],
    "stacked with one from before": lambda x: torch.stack([x, SIDE.expand(x.shape[0], -1, -1, -1)], 2)[:, :, 0],
    "spelt otherwise": lambda x: torch.subtract(torch.multiply(x, CHANNELS), 1).negative(),
}


@pytest.mark.parametrize("f", SAME.values(), ids=SAME)
def test_cells_by_themselves(f: Callable[[Tensor], Tensor]) -> None:
    assert grid_of(f) == Grid()


def cells(x: Tensor) -> Tensor:
    """[B, H * W, C]."""
    return x.flatten(2).transpose(1, 2)


def attend(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, k, mask)


W = torch.ones(4, 4, 3, 3)
MOVED: dict[str, tuple[Callable[[Tensor], Tensor], Grid]] = {
    "3x3": (lambda x: F.conv2d(x, W, padding=1), Grid(mixed=True)),
    "stride": (lambda x: F.conv2d(x, W, stride=(2, 3), padding=1), Grid(step=(2, 3), mixed=True)),
    "twice": (
        lambda x: F.conv2d(F.conv2d(x, W, stride=2, padding=1), torch.ones(1, 4, 2, 2), stride=2),
        Grid(step=(4, 4), start=(Fraction(1), Fraction(1)), mixed=True),
    ),
    "no padding": (lambda x: F.conv2d(x, W, padding=(0, 1)), Grid(start=(Fraction(1), F0), mixed=True)),
    "same": (lambda x: F.conv2d(x, W, padding="same", dilation=2), Grid(mixed=True)),
    "dilation": (lambda x: F.conv2d(x, W, padding=1, dilation=2), Grid(start=(Fraction(1), Fraction(1)), mixed=True)),
    "groups": (lambda x: F.conv2d(x, torch.ones(4, 1, 5, 5), padding=2, groups=4), Grid(mixed=True)),
    "max pool": (lambda x: F.max_pool2d(x, 3, 2, 1), Grid(step=(2, 2), mixed=True)),
    "average pool": (lambda x: F.avg_pool2d(x, 2), Grid(step=(2, 2), start=(Fraction(1, 2),) * 2, mixed=True)),
    "padded as tensorflow does": (
        lambda x: F.conv2d(F.pad(x, (1, 1, 0, 1)), W, stride=2),
        Grid(step=(2, 2), start=(Fraction(1), F0), mixed=True),
    ),
    "every other": (lambda x: x[:, :, ::2, ::2], Grid(step=(2, 2), mixed=True)),
    "group norm": (lambda x: F.group_norm(x, 2), Grid(mixed=True)),
    "training": (
        lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True),
        Grid(mixed=True),
    ),
    "channels last": (lambda x: x.permute(0, 2, 3, 1), Grid(1, 2)),
    "folded": (lambda x: x.flatten(2), Grid(2, 2)),
    "folded, sizes written": (lambda x: x.view(x.shape[0], 4, 70).relu(), Grid(2, 2)),
    "folded, one open": (lambda x: x.reshape(x.shape[0], 4, -1), Grid(2, 2)),
    "folded channels last": (lambda x: F.layer_norm(x.permute(0, 2, 3, 1).flatten(1, 2), [4]), Grid(1, 1)),
    "sequence": (lambda x: F.linear(x.flatten(2).transpose(1, 2), torch.ones(3, 4)), Grid(1, 1)),
    "folded and back": (lambda x: x.flatten(2).relu().view(x.shape[0], 4, 10, 7), Grid()),
    "back by the cells alone": (lambda x: x.flatten(2).unflatten(2, (10, 7)).unflatten(1, (2, 2)), Grid(3, 4)),
    "channels left open": (lambda x: cells(x).reshape(x.shape[0], 10, 7, -1), Grid(1, 2)),
    "heads": (lambda x: cells(x).view(x.shape[0], 70, -1, 2).transpose(1, 2), Grid(2, 2)),
    "heads in the batch": (lambda x: x.flatten(2).reshape(x.shape[0] * 2, 2, 70), Grid(2, 2)),
    "heads joined": (lambda x: cells(x).unflatten(2, (2, 2)).reshape(x.shape[0], 70, -1), Grid(1, 1)),
    "one of two": (lambda x: cells(x).reshape(x.shape[0], 70, 2, 2).permute(2, 0, 1, 3)[1], Grid(1, 1)),
    "each of two": (lambda x: x.unflatten(1, (2, 2)).unbind(1)[1], Grid()),
    "attention": (lambda x: attend(cells(x), cells(x.relu())), Grid(1, 1, mixed=True)),
    "attention to a smaller map": (lambda x: attend(cells(x), cells(F.avg_pool2d(x, 2))), Grid(1, 1, mixed=True)),
    "mean of channels": (lambda x: x.mean(1), Grid(1, 2, mixed=True)),
    "mean of columns": (lambda x: x.mean(3), Grid(2, None, mixed=True)),
    "a gate of each row": (lambda x: x * x.mean(3, keepdim=True).sigmoid(), Grid(mixed=True)),
    "a gate of rows and columns": (lambda x: x.mean(3, keepdim=True) + x.amax(2, keepdim=True), Grid(mixed=True)),
    "rows in heads": (lambda x: x.mean(3).view(x.shape[0], 2, 2, -1), Grid(3, None, mixed=True)),
    "stacked last": (lambda x: torch.stack([x, x.relu()], -1), Grid()),
    "one sample for all": (lambda x: x[:1] + x, Grid()),
    "gated": (lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), Grid()),
}


@pytest.mark.parametrize(("f", "grid"), MOVED.values(), ids=MOVED)
def test_where_the_axes_go(f: Callable[[Tensor], Tensor], grid: Grid) -> None:
    assert grid_of(f) == grid


ENDED: dict[str, Callable[[Tensor], Tensor]] = {
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "adaptive maximum": lambda x: F.adaptive_max_pool2d(x, (1, 1)).flatten(1),
    "a window as large": lambda x: F.avg_pool2d(x, 16, ceil_mode=True, padding=4).reshape(x.shape[:2]),
    "mean": lambda x: x.mean((-2, -1)),
    "attended by other queries": lambda x: attend(torch.ones(1, 3, 4).expand(x.shape[0], -1, -1), cells(x)),
    "mean of cells": lambda x: x.view(x.shape[0], 4, -1).mean(2),
    "maximum": lambda x: x.amax((2, 3)),
    "one after the other": lambda x: x.mean(3).mean(2),
    "all": lambda x: x.permute(0, 2, 3, 1).mean((1, 2)),
    "variance": lambda x: torch.var_mean(x, (2, 3))[0],
}


@pytest.mark.parametrize("f", ENDED.values(), ids=ENDED)
def test_pooling_ends_the_axes(f: Callable[[Tensor], Tensor]) -> None:
    assert grid_of(f) is None


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "open channels": (lambda x: x.reshape(x.shape[0], -1, 70), "a fixed grid that the layers behind it need"),
    "channels folded": (lambda x: x.flatten(1, 2), "reshapes the map of 10 x 7 to"),
    "columns before rows": (lambda x: x.transpose(2, 3).flatten(2), "reshapes the map of 10 x 7|7 x 10"),
    "rows apart from columns": (lambda x: x.permute(0, 2, 1, 3).flatten(1, 2), "reshapes the map of 10 x 7 to"),
    "heads": (lambda x: x.flatten(2).view(-1, 2, 2, 70), "reshapes the map of 70 to"),
    "every other cell": (lambda x: x.flatten(2)[:, :, ::2], "takes every n-th cell of a map that is folded"),
    "a token more": (lambda x: torch.cat([x.mean((2, 3), True).flatten(2), x.flatten(2)], 2), "a concatenation runs"),
    "a table": (lambda x: x.flatten(2) + torch.ones(70), "from before the cut, whose rows and columns cannot be"),
    "products of cells": (lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2), "no rule says what this op does"),
    "flatten": (lambda x: x.flatten(1), r"reshapes the map of 10 x 7 to \['batch', 280\], a fixed grid"),
    "pooled grid": (lambda x: F.adaptive_avg_pool2d(x, (5, 1)), "pools the map to 5 x 1, a size that the model may"),
    "sum": (lambda x: x.sum((2, 3)), "depends on how many there are"),
    "norm": (lambda x: x.norm(p=2, dim=(2, 3)), "depends on how many there are"),
    "interpolate": (lambda x: F.interpolate(x, size=(20, 14)), "no rule says what this op does on a smaller grid"),
    "part of the rows": (lambda x: x[:, :, 1:5], "takes rows or columns by their number"),
    "padding": (lambda x: F.pad(x, (0, 1, 0, 1)).mean((2, 3)), "by amounts that the model may compute from their"),
    "padding, none for this size": (lambda x: F.pad(x, (0, 0, 0, 0)).mean(3), "by amounts that the model may compute"),
    "padding, more than is needed": (
        lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1)), torch.ones(3, 4, 3, 3), stride=2),
        "by amounts that the model may compute from their number",
    ),
    "padding of channels too": (lambda x: F.pad(x, (0, 1, 0, 1, 0, 1)), "pads other dimensions together with rows"),
    "rows reversed": (lambda x: x.flip(2), "changes the order of the rows or columns"),
    "shifted": (lambda x: x.roll(1), "changes the order of the rows or columns"),
    "row by row": (lambda x: x.unbind(2)[0], "takes apart a dimension that runs over rows or columns"),
    "rows split": (lambda x: x.split(5, 2)[0], "a split runs over rows or columns"),
    "picked rows": (lambda x: x[:, :, [0, 2]], "indexes a dimension that runs over rows or columns"),
    "rows by number": (lambda x: x.narrow(2, 0, 4), "takes rows or columns by their number"),
    "rows written, channels open": (lambda x: x.mean(3).view(x.shape[0], -1, 10), "reshapes the map of 10 to"),
    "repeated": (lambda x: x.repeat(1, 2, 1, 1), "no rule says what this op does on a smaller grid"),
    "mean of samples": (lambda x: x.mean(0), "a reduction runs over the samples of the batch"),
    "each sample with each": (lambda x: x[:, None] * x, "lets the samples of the batch meet"),
    "a table for each column": (lambda x: x + x.mean(3, keepdim=True) * torch.ones(7), "do not belong together"),
    "batch norm of rows": (
        lambda x: F.batch_norm(x.transpose(1, 2), torch.zeros(10), torch.ones(10)),
        "batch norm runs over rows or columns",
    ),
    "along rows": (lambda x: x.softmax(2), "an op along a dimension that runs over rows or columns"),
    "joined along rows": (lambda x: torch.cat([x, x], 2), "a concatenation runs over rows or columns"),
    "norm over rows": (lambda x: F.layer_norm(x, [10, 7]), "a norm runs over rows or columns"),
    "linear over columns": (lambda x: F.linear(x, torch.ones(3, 7)), "a linear layer runs over rows or columns"),
    "conv of permuted": (lambda x: F.conv2d(x.permute(0, 2, 1, 3), torch.ones(3, 10, 1, 1)), "a window slides over"),
    "other resolution": (lambda x: F.conv2d(x, W, stride=2, padding=1) + SIDE[:, :, ::2, ::2], "from before the cut"),
    "rows only": (lambda x: x + SIDE[:, :, :, :1], "from before the cut, whose rows and columns cannot be matched"),
    "resolutions": (lambda x: F.avg_pool2d(x, (2, 1)) + x[:, :, 5:], "takes rows or columns by their number"),
    "windows": (lambda x: cells(x).view(x.shape[0], 5, 2, 7, 4), "reshapes the map of 70 to .*, a fixed grid"),
    "windows of rows": (lambda x: x.unflatten(2, (5, 2)), "reshapes the map of 10 x 7 to .*, a fixed grid"),
    "turned back": (lambda x: x.flatten(2).view(x.shape[0], 4, 7, 10), "reshapes the map of 70 to .*, a fixed grid"),
    "rows left open": (lambda x: x.flatten(2).view(x.shape[0], 4, -1, 7), "reshapes the map of 70 to"),
    "samples left open": (lambda x: x.flatten(2).view(-1, 4, 10, 7), "reshapes the map of 70 to"),
    "one channel with others": (lambda x: cells(x)[:, 3], "one entry of a dimension that runs over rows or columns"),
    "one sample": (lambda x: x[0] + x, "takes one sample of the batch"),
    "masked": (lambda x: attend(cells(x), cells(x), torch.ones(70, 70)), "attends by a mask"),
    "causal": (lambda x: F.scaled_dot_product_attention(*[cells(x)] * 3, is_causal=True), "attends by a mask"),
    "along columns": (lambda x: attend(x.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)), "along rows or columns alone"),
    "over channels": (lambda x: attend(x.flatten(2), x.flatten(2)), "over channels"),
    "keys without values": (
        lambda x: F.scaled_dot_product_attention(cells(x), cells(x), SIDE.flatten(2).mT.expand(x.shape[0], -1, -1)),
        "takes keys and values of different maps",
    ),
    "turned": (lambda x: x @ x.transpose(2, 3), "no rule says"),
}


@pytest.mark.parametrize(("f", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_op_the_line_and_a_way_out(f: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(Refusal, match=words) as e:
        grid_of(f)
    assert "aten." in str(e.value) and "in the model: File" in str(e.value) and "way out: cut a later" in str(e.value)


def test_frames_folded_into_the_samples() -> None:
    """[8 B, C, H, W], of each sample's frames in a row: taken apart and joined again they are the same."""

    def frames(x: Tensor) -> Tensor:
        whole = x.repeat(8, 1, 1, 1)
        start = whole * 2
        return start.unflatten(0, (-1, 8)).sin().flatten(0, 1) + whole

    gm = graph_of(frames, x())
    (start,) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    (end,) = leaves(gm)
    axes = follow_grid(start)
    assert axes.grid(end) == Grid() and axes.sample_for_sample(end)
    assert [n.target for n in axes.transfers[end].aligned] == [torch.ops.aten.repeat.default]


def test_maps_of_two_steps_do_not_meet() -> None:
    square = torch.randn(2, 4, 8, 8)
    gm = graph_of(lambda x: F.conv2d(x, W, stride=2, padding=1) * F.conv2d(x, torch.ones(4, 4, 5, 5)), square)
    with pytest.raises(Refusal, match="rows or columns do not belong together"):
        follow_grid(first_input(gm))


def test_within_a_branch_nothing_is_refused() -> None:
    gm = graph_of(lambda x: F.relu(x).flatten(1), x())
    axes = follow_grid(first_input(gm), within=set(gm.graph.nodes))
    assert [n.target for n in axes.transfers] == [torch.ops.aten.relu.default]
