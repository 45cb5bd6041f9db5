"""The demo's pictures: a handwritten digit somewhere on a photograph, turned and scaled, among strokes that are none.

Which tokens matter differs from picture to picture, as in photographs: a digit covers about an eighth of the patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 56  # pixels
SIZE = (24.0, 32.0)  # side of a scan in the picture, pixels
TURN = math.radians(20)  # at most, to either side
STROKES = 3
LENGTH, WIDTH = (8.0, 18.0), (2.0, 4.5)  # of a stroke, pixels
TRIES = 4  # places drawn for a stroke; the one farthest from the digit is taken
CONTRAST = (0.5, 0.7)  # in brightness, of what is written with the photograph
TINT = 0.15  # how far colours are from grey
FAINT = 0.5  # how much of the photograph's contrast is left
EDGE = 1.6  # how much steeper than the scan's the edges of a digit are
_POINTS = 17  # of a stroke
_SEED = 2026


class Labelled(NamedTuple):
    """Pictures [n, 3, 56, 56] in -1..1, as the model takes them, and the digit on each, [n]."""

    inputs: Tensor
    labels: Tensor


def demo_pictures(count: int | None = None) -> Labelled:
    """Pictures of the digits and photographs that come with this package; the model has seen none of either.

    Args:
        count: the first so many of 596; None for all.
    """
    data = safetensors.torch.load(files("rs_compile").joinpath("data", "demo_pictures.safetensors").read_bytes())
    photographs = [value for name, value in sorted(data.items()) if name.startswith("photograph.")]
    pictures = compose(data["scans"], photographs, torch.Generator().manual_seed(_SEED))
    return Labelled(centred(pictures)[:count], data["labels"].long()[:count])


def centred(pictures: Tensor) -> Tensor:
    """Pictures in 0..1 as the model takes them, in -1..1."""
    return 2 * pictures - 1


def compose(
    scans: Tensor,
    photographs: Sequence[Tensor],
    generator: torch.Generator,
    side: int = SIDE,
    faint: float = FAINT,
    strokes: int = STROKES,
) -> Tensor:
    """A picture of each scan, drawn from `generator`.

    Args:
        scans: uint8 [n, 8, 8] in 0..16, as in scikit-learn.
        photographs: uint8 [height, width, 3], both at least `side`.
        side: of the pictures, pixels.
        faint: how much of the photographs' contrast is left.
        strokes: a picture.

    Returns:
        float32 [n, 3, side, side] in 0..1.
    """
    n = len(scans)
    ground = torch.stack([_crop(photographs, side, generator) for _ in range(n)])
    mean = ground.mean((1, 2, 3))
    ground = mean.view(n, 1, 1, 1) + faint * (ground - mean.view(n, 1, 1, 1))
    size = _between(SIZE, generator, n).clamp(max=side)
    centre = size[:, None] / 2 + torch.rand(n, 2, generator=generator) * (side - size)[:, None]
    written = [*_strokes(centre, side, strokes, generator).unbind(1), _digits(scans, centre, size, side, generator)]
    # light on a dark photograph, dark on a light one, the same for digit and strokes
    sign = torch.where(mean + 0.1 * _between((-1, 1), generator, n) < 0.5, 1.0, -1.0)
    for ink in written:
        bright = mean + sign * _between(CONTRAST, generator, n)
        colour = (bright[:, None] + TINT / 2 * _between((-1, 1), generator, n, 3)).clamp(0, 1)
        ground = torch.lerp(ground, colour[:, :, None, None], ink[:, None])
    return ground.clamp(0, 1)


def _between(ends: tuple[float, float], generator: torch.Generator, *shape: int) -> Tensor:
    return ends[0] + (ends[1] - ends[0]) * torch.rand(shape, generator=generator)


def _crop(photographs: Sequence[Tensor], side: int, generator: torch.Generator) -> Tensor:
    """[3, side, side] in 0..1, of any photograph, mirrored or not."""

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    photo = photographs[draw(len(photographs))]
    top, left = draw(photo.shape[0] - side + 1), draw(photo.shape[1] - side + 1)
    crop = photo[top : top + side, left : left + side].permute(2, 0, 1) / 255
    return crop.flip(2) if draw(2) else crop


def _digits(scans: Tensor, centre: Tensor, size: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """How much ink each pixel has, [n, side, side] in 0..1, of scans with these centres [n, 2] and sides [n]."""
    angle, zoom = TURN * _between((-1, 1), generator, len(scans)), side / size
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    # from a place in the picture to one in the scan, both in -1..1
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    shift = -turn @ (2 * centre / side - 1)[:, :, None]
    grid = F.affine_grid(torch.cat([turn, shift], 2), [len(scans), 1, side, side], align_corners=False)
    ink = F.grid_sample(scans[:, None] / 16, grid, mode="bicubic", align_corners=False)[:, 0]
    return (0.5 + EDGE * (ink - 0.5)).clamp(0, 1)


def _strokes(digit: Tensor, side: int, count: int, generator: torch.Generator) -> Tensor:
    """How much ink each pixel has, [n, count, side, side] in 0..1: arcs with round ends, away from the digit's centre
    [n, 2]."""
    n = len(digit)
    places = torch.rand(n, count, TRIES, 2, generator=generator) * side
    farthest = (places - digit[:, None, None]).norm(dim=-1).argmax(-1)
    place = places.gather(2, farthest[..., None, None].expand(-1, -1, 1, 2))
    angle = _between((0, 2 * math.pi), generator, n, count, 1)
    along = torch.cat([angle.cos(), angle.sin()], 2) * _between(LENGTH, generator, n, count, 1) / 2
    bend = torch.stack([-along[..., 1], along[..., 0]], -1) * _between((-1, 1), generator, n, count, 1)
    t = torch.linspace(-1, 1, _POINTS)[:, None]
    points = place + t * along[:, :, None] + (1 - t * t) * bend[:, :, None]
    axis = torch.arange(side) + 0.5
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(-1, 2)
    away = torch.cdist(pixels.expand(n, count, -1, -1), points).amin(-1)
    return (_between(WIDTH, generator, n, count, 1) / 2 - away + 0.5).clamp(0, 1).view(n, count, side, side)
