"""Score maps and their picture: every number against eager code, every pixel against where its patch lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import rs_compile
from rs_compile.visualize import save_picture
from rs_compile.visualize.picture import OPACITY, PANEL, colour_range, overlay

pytestmark = pytest.mark.usefixtures("captured_once")

HEIGHT, WIDTH, PATCH = 48, 80, 8
ROWS, COLUMNS = HEIGHT // PATCH, WIDTH // PATCH


class Brightness(nn.Module):
    """Its MLP gives 0, so a token's shift is its own norm: twice the brightness of its patch."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 4, PATCH, PATCH, bias=False)
        nn.init.constant_(self.cut.weight, 1 / (3 * PATCH * PATCH))
        self.token = nn.Parameter(torch.full((1, 1, 4), 9.0))
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.cut(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.mlp(x)
        return x.mean(1)


def patchwork(brightness: Tensor) -> Tensor:
    """Images [B, 3, H, W] of grey patches [B, rows, columns]."""
    return brightness.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None].expand(-1, 3, -1, -1)


def random_patches(images: int = 2) -> Tensor:
    return torch.rand(images, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def test_the_map_lies_where_the_patches_lie() -> None:
    brightness = random_patches()
    maps = rs_compile.score_maps(Brightness().eval(), patchwork(brightness), [0])
    (layer,) = maps.layers
    assert maps.size == (HEIGHT, WIDTH) and maps.score == "MLP shift, l2"
    assert layer.index == 0 and layer.attention is None and layer.grid.shape == (ROWS, COLUMNS)
    torch.testing.assert_close(layer.shift, 2 * brightness)


def test_the_bright_patch_has_the_last_colour_and_its_exact_pixels() -> None:
    brightness = torch.zeros(1, ROWS, COLUMNS)
    brightness[0, 2, 7] = 1
    maps = rs_compile.score_maps(Brightness().eval(), patchwork(brightness))
    layer = maps.layers[0]
    black = np.zeros((HEIGHT, WIDTH, 3))  # so that all colour is the map's
    drawn = overlay(black, layer.shift[0], layer.grid, colour_range(layer.shift[0]))
    bright = np.zeros((HEIGHT, WIDTH), dtype=bool)
    bright[16:24, 56:64] = True
    first, last = (OPACITY * np.array(matplotlib.colormaps["viridis"](end)[:3]) for end in (0.0, 1.0))
    assert np.allclose(drawn[bright], last, atol=0.01)
    assert np.allclose(drawn[~bright], first, atol=0.01)


def test_the_picture_holds_the_maps_pixel_for_pixel(tmp_path: Path) -> None:
    brightness = random_patches()
    maps = rs_compile.score_maps(Brightness().eval(), patchwork(brightness), schedule={0: 0.5})
    photos = list(np.random.RandomState(0).rand(2, HEIGHT, WIDTH, 3))
    save_picture(tmp_path / "o.png", ["a$1$b.png", "long name " * 40 + "\n.png"], photos, maps)
    with Image.open(tmp_path / "o.png") as image:
        sheet = np.asarray(image.convert("RGB")).astype(int)
    factor = PANEL // WIDTH
    assert PANEL % WIDTH == 0
    panels = []
    for i in range(2):
        layer = maps.layers[0]
        tinted = overlay(photos[i], layer.shift[i], layer.grid, colour_range(layer.shift[i]))
        shown = [_place(sheet, p, factor) for p in (photos[i], tinted)]
        left = _place(sheet, photos[i], factor, maps.sites[0].kept[i].numpy())
        assert shown[0][0] == shown[1][0] < left[0] and shown[0][1] < shown[1][1] == left[1]
        panels.append(shown[0])
    assert panels[0][1] == panels[1][1] and panels[0][0] < panels[1][0]
    assert max(top for top, _ in panels) + HEIGHT * factor < sheet.shape[0]
    assert (sheet[:, -8:] == 255).all() and (sheet[-8:] == 255).all()  # nothing runs over the edge


def _place(sheet: np.ndarray, pixels: np.ndarray, factor: int, kept: np.ndarray | None = None) -> tuple[int, int]:
    """Where the enlarged pixels stand in the sheet; where `kept` is given, only those patches."""
    wanted = np.round(pixels * 255).astype(int).repeat(factor, 0).repeat(factor, 1)
    height, width = wanted.shape[:2]
    side = PATCH * factor
    mask = np.ones((height, width), bool) if kept is None else kept.repeat(side, 0).repeat(side, 1)
    r, c = (int(v) for v in np.argwhere(mask)[0])
    tops, lefts = np.nonzero((abs(sheet - wanted[r, c]) <= 1).all(-1))
    for top, left in zip(tops - r, lefts - c, strict=True):
        part = sheet[max(top, 0) : top + height, max(left, 0) : left + width]
        if part.shape != wanted.shape or not (abs(part[mask] - wanted[mask]) <= 1).all():
            continue
        if kept is None or (abs(part - wanted).max(-1)[~mask] > 1).mean() > 0.9:
            return int(top), int(left)
    raise AssertionError("the panel is not in the picture")


@pytest.fixture(scope="module")
def vit() -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=(32, 64), num_classes=10, depth=3).eval()


IMAGES = torch.randn(3, 3, 32, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_scores_are_those_of_eager_code(vit: Any) -> None:
    found: dict[str, Tensor] = {}
    block = vit.blocks[2]
    hooks = [
        block.norm2.register_forward_hook(lambda _, args, __: found.update(stream=args[0])),
        block.ls2.register_forward_hook(lambda _, __, out: found.update(term=out)),
        block.attn.qkv.register_forward_hook(lambda _, __, out: found.update(qkv=out)),
    ]
    vit(IMAGES)
    for hook in hooks:
        hook.remove()
    shift = (found["term"] - found["stream"]).pow(2).sum(-1).sqrt()[:, 1:]
    heads = block.attn.num_heads
    q, k, _ = found["qkv"].reshape(3, 9, 3, heads, -1).permute(2, 0, 3, 1, 4)
    attention = torch.einsum("bhqd,bhkd->bhqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)[:, :, 0, 1:].mean(1)
    maps = rs_compile.score_maps(vit, IMAGES, [1, 2])
    layer = maps.layers[1]
    assert [la.index for la in maps.layers] == [1, 2] and layer.where == "blocks.2"
    assert layer.grid.shape == (2, 4) and layer.attention_kind == "class attention"
    torch.testing.assert_close(layer.shift, shift.reshape(3, 2, 4))
    assert layer.attention is not None
    torch.testing.assert_close(layer.attention, attention.reshape(3, 2, 4))


def test_without_a_class_token_the_attention_is_the_mean(vit: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "test_vit", img_size=32, num_classes=10, class_token=False, global_pool="avg", depth=2
    ).eval()
    (layer,) = rs_compile.score_maps(
        model, IMAGES[..., :32], [1], shift=rs_compile.Shift(of="attention", metric="cosine")
    ).layers
    assert layer.attention_kind == "mean attention" and layer.attention is not None
    torch.testing.assert_close(
        layer.attention.sum((1, 2)), torch.ones(3)
    )  # each query spreads one, and the mean is over queries


class Tokens(nn.Module):
    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.forward_features(images)


def test_kept_patches_are_the_compilers(vit: Any) -> None:
    ratios = {0: 0.8, 2: 0.6}
    sites = rs_compile.score_maps(vit, IMAGES, [0], schedule=ratios).sites
    assert [site.index for site in sites] == [0, 2]
    assert all(site.of == 9 for site in sites)
    for n, site in enumerate(sites, 1):
        first = dict(list(ratios.items())[:n])
        compact = rs_compile.optimize(Tokens(vit), first, backend="eager", token_outputs="compact")
        with torch.no_grad():
            positions = compact(IMAGES).kept
        assert site.left == positions.shape[1]
        left = [sorted(1 + i for i in kept.flatten().nonzero()[:, 0].tolist()) for kept in site.kept]
        assert left == [[p for p in row if p > 0] for row in positions.tolist()]


def test_a_schedule_keeps_by_its_own_score() -> None:
    brightness = random_patches()
    images = patchwork(brightness)
    schedule = rs_compile.Schedule({0: 0.5}, score=rs_compile.Lowest())
    (site,) = rs_compile.score_maps(Brightness().eval(), images, schedule=schedule).sites
    for kept, values in zip(site.kept, brightness, strict=True):
        assert kept.sum() == 30 and site.left == 31 and values[kept].max() < values[~kept].min()


def test_of_merged_tokens_the_destinations_are_left(vit: Any) -> None:
    (site,) = rs_compile.score_maps(
        vit, IMAGES, [0], schedule=rs_compile.Schedule(merge={0: 3}, by=rs_compile.ToMe())
    ).sites
    assert (site.left, site.of) == (6, 9) and site.kept.sum((1, 2)).tolist() == [5, 5, 5]


@torch.no_grad()
def test_merged_patches_name_the_one_that_stands_for_them(vit: Any) -> None:
    schedule = rs_compile.Schedule(merge={0: 2, 1: 2}, by=rs_compile.Ward(restore="copy"))
    dense = rs_compile.optimize(Tokens(vit), schedule, backend="eager")(IMAGES)[:, 1:]
    last = rs_compile.score_maps(vit, IMAGES, [0], schedule=schedule).sites[-1]
    for tokens, stands in zip(dense, last.stands.flatten(1), strict=True):
        same = (tokens[:, None] == tokens[None]).all(-1)  # copies of their destinations, to the bit
        assert torch.equal(same, stands[:, None] == stands[None]) and len(stands.unique()) == 4
        assert torch.equal(stands[stands], stands)
    assert last.others == 1 and last.kept.sum((1, 2)).tolist() == [4, 4, 4]


def test_where_merged_patches_left_none_stands_for_them(vit: Any) -> None:
    schedule = rs_compile.Schedule({2: 0.5}, merge={0: 3}, by=rs_compile.ToMe())
    merged, pruned = rs_compile.score_maps(vit, IMAGES, [0], schedule=schedule).sites
    for before, after in zip(merged.stands.flatten(1), pruned.stands.flatten(1), strict=True):
        assert ((after == before) | (after == -1)).all() and (before >= 0).all()
        gone = set(before[after == -1].tolist())
        assert gone.isdisjoint(after.tolist()) and len(gone) == merged.left - pruned.left


def test_what_a_merger_drops_has_left(vit: Any) -> None:
    """DiffRate's dropped tokens come back as they left, so no token stands for them."""
    schedule = rs_compile.Schedule(merge={0: 4}, by=rs_compile.DiffRate(pruned={0: 3}))
    (site,) = rs_compile.score_maps(vit, IMAGES, [0], schedule=schedule).sites
    assert (site.left, site.of) == (5, 9) and site.kept.sum((1, 2)).tolist() == [4, 4, 4]
    assert (site.stands < 0).sum((1, 2)).tolist() == [3, 3, 3]


def stage_by_hand(stage: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """A ResNet stage's output [B, C, H, W] and its shift [B, H, W] against the shortcut of its first block."""
    first: Any = stage[0]
    shortcut = x if first.downsample is None else first.downsample(x)
    out = stage(x)
    return out, (out - shortcut).pow(2).sum(1).sqrt()


@torch.no_grad()
def test_stages_and_what_is_left_of_them() -> None:
    torch.manual_seed(0)
    net: Any = timm.create_model("resnet18", num_classes=4, zero_init_last=False).eval()
    images = torch.randn(2, 3, 64, 64)
    stem = net.maxpool(net.act1(net.bn1(net.conv1(images))))
    one, score_one = stage_by_hand(net.layer1, stem)
    _, score_two = stage_by_hand(net.layer2, one)
    cuts = {0: rs_compile.GridPrune(2, 4), 1: rs_compile.GridPrune(1, 2)}
    maps = rs_compile.score_maps(net, images, [1, 0], schedule=rs_compile.Schedule(grid=cuts))
    assert (maps.unit, maps.cells) == ("stage", "cells") and [la.index for la in maps.layers] == [1, 0]
    torch.testing.assert_close(maps.layers[0].shift, score_two, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps.layers[1].shift, score_one, rtol=1e-4, atol=1e-4)
    assert maps.layers[0].grid.shape == (8, 8) and maps.layers[1].grid.rows.step == 4
    assert [(s.left, s.of) for s in maps.sites] == [(14 * 12, 256), (6 * 4, 64)]
    for b in range(2):
        rows = score_one[b].mean(1).topk(14).indices.sort().values
        columns = score_one[b].mean(0).topk(12).indices.sort().values
        left = torch.zeros(16, 16, dtype=torch.bool)
        left[rows[:, None], columns] = True
        assert torch.equal(maps.sites[0].kept[b], left)
        _, score = stage_by_hand(net.layer2, one[b : b + 1, :, rows][..., columns])
        assert score.shape == (1, 7, 6)
        # of the 7 rows each stands for two of the 14 left, and so for two of the 16
        rows = rows.reshape(7, 2)[score[0].mean(1).topk(6).indices].flatten()
        columns = columns.reshape(6, 2)[score[0].mean(0).topk(4).indices].flatten()
        left = torch.zeros(16, 16, dtype=torch.bool)
        left[rows[:, None], columns] = True
        assert torch.equal(maps.sites[1].kept[b], left)


def test_refusals() -> None:
    unknown: Any = "l3"
    model, images = Brightness().eval(), patchwork(random_patches())
    with pytest.raises(
        rs_compile.CompileError, match="layer 6 does not exist: the model has 1 blocks, counted from 0 to 0; name"
    ):
        rs_compile.score_maps(model, images, [0, 6])
    with pytest.raises(rs_compile.CompileError, match="no layer is asked for"):
        rs_compile.score_maps(model, images, [])
    with pytest.raises(rs_compile.CompileError, match="the schedule names block 7"):
        rs_compile.score_maps(model, images, [0], schedule={7: 0.5})
    with pytest.raises(rs_compile.ScheduleError, match="unknown metric 'l3'"):
        rs_compile.score_maps(model, images, [0], shift=rs_compile.Shift(metric=unknown))
    with pytest.raises(rs_compile.Refusal, match="the model has no stage of residual convolutions"):
        rs_compile.score_maps(model, images, schedule=rs_compile.Schedule(grid={0: rs_compile.GridPrune(1, 1)}))
    with pytest.raises(rs_compile.Refusal, match="the model has no residual branch"):
        rs_compile.score_maps(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(2, 3, 2, 2))


def test_colours_end_where_outliers_begin() -> None:
    values = torch.arange(100.0).reshape(10, 10)
    values[0, 0] = torch.nan
    values[9, 9] = 1e6
    assert colour_range(values) == (1, 98)
    assert colour_range(torch.full((2, 2), torch.nan)) == (0, 0)
    only = torch.zeros(10, 10)
    only[3, 3] = 5
    assert colour_range(only) == (0, 5)
