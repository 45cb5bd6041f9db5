"""Score maps as a PNG: every pixel of the image as a square of whole pixels, cells with their exact borders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from passes.graph.base import CompileError
from passes.graph.codes import Code
from passes.network.patch_grid import Extent, PatchGrid
from rs_compile.visualize.layers import ScoreMaps

Picture = NDArray[np.floating[Any]]  # [height, width, 3] in 0..1

COLOURS = "viridis"  # perceptually even, and readable to the colour-blind
OPACITY = 0.65  # of the map over the image, which is shown in grey
COVER = (150, 132, 196)  # over a patch that has left: no photograph's colour, neither dark nor light
GONE = 0.8  # its opacity
PANEL = 320  # an image is enlarged by the whole number that brings its wider side to this many pixels or more
GAP, MARGIN = 16, 24
BAR = 12  # height of the colour scale
LINE = 30  # height of a line of text
DPI = 100
_MOST = 0.98  # of the cells lie inside the colour scale; the others have its last colour
LETTERS = 20  # pixels that text is high


class MissingLibrary(CompileError):
    """An optional library that is not installed."""

    family = Code.MISSING


def save_picture(path: Path, names: Sequence[str], photos: Sequence[Picture], maps: ScoreMaps) -> None:
    """Writes a PNG: for each image the image itself, a row of maps a score, a row of what is left after each site.

    Args:
        path: of the PNG.
        names: of the images.
        photos: what the model saw, [height, width, 3] in 0..1, of `maps.size`.
        maps: of these images, in this order.

    Raises:
        MissingLibrary: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    factor = math.ceil(PANEL / max(maps.size))
    height, width = maps.size[0] * factor, maps.size[1] * factor
    step = LINE + height + BAR + LINE + GAP
    rows = [_panels(photo, i, maps) for i, photo in enumerate(photos)]
    columns = max(len(panels) for image in rows for panels in image)
    total_width = 2 * MARGIN + columns * (width + GAP) - GAP
    total_height = MARGIN + sum(LINE + GAP + len(image) * step for image in rows)
    figure = _figure(total_width, total_height)
    top = MARGIN
    for name, image in zip(names, rows, strict=True):
        _fit(figure, MARGIN, top, total_width - 2 * MARGIN, name, weight="bold")
        top += LINE + GAP
        for panels in image:
            for column, panel in enumerate(panels):
                if panel is not None:
                    _draw(figure, MARGIN + column * (width + GAP), top, width, _enlarged(panel[1], factor), *panel)
            top += step
    figure.savefig(path, format="png", dpi=DPI)


Panel = tuple[str, Picture, "tuple[float, float] | None"]  # title, pixels, ends of the colour scale


def _panels(photo: Picture, index: int, maps: ScoreMaps) -> list[list[Panel | None]]:
    """The rows of panels of one image."""
    shift: list[Panel | None] = [("what the model sees", photo, None)]
    attention: list[Panel | None] = [None]
    for layer in maps.layers:
        found = ((shift, layer.shift, maps.score), (attention, layer.attention, layer.attention_kind))
        for row, values, name in found:
            if values is None:
                row.append(None)
                continue
            ends = colour_range(values[index])
            pixels = overlay(photo, values[index], layer.grid, ends)
            row.append((f"{maps.unit} {layer.index}: {name}", pixels, ends))
    kept: list[Panel | None] = [None]
    for site in maps.sites:
        title = f"after {maps.unit} {site.index}: {site.left} of {site.of} {maps.cells}"
        kept.append((title, covered(photo, site.kept[index], site.grid), None))
    return [row for row in (shift, attention, kept) if any(panel is not None for panel in row)]


def colour_range(values: Tensor) -> tuple[float, float]:
    """The scores at the two ends of the colour scale: the lowest, and one that 2% reach; a few outliers (there are
    some, in attention most of all) would leave all other cells one colour."""
    finite = values[values.isfinite()]
    if not finite.numel():
        return 0.0, 0.0
    low, high = float(finite.min()), float(finite.quantile(_MOST, interpolation="higher"))
    return low, high if high > low else float(finite.max())


def edges(extent: Extent, pixels: int) -> list[int]:
    """The pixels at which cells begin, and the one at which the last ends."""
    return [extent.edge(i, pixels) for i in range(extent.cells + 1)]


def over_pixels(values: NDArray[Any], grid: PatchGrid, size: tuple[int, int]) -> NDArray[Any]:
    """A map [rows, columns] at the image's size [height, width]: each pixel has its cell's value, NaN outside."""
    picked, inside = [], []
    for extent, pixels in zip((grid.rows, grid.columns), size, strict=True):
        at = np.searchsorted(edges(extent, pixels), np.arange(pixels), side="right") - 1
        inside.append((at >= 0) & (at < extent.cells))
        picked.append(at.clip(0, extent.cells - 1))
    spread = values[np.ix_(*picked)].astype(float)
    return np.where(inside[0][:, None] & inside[1], spread, np.nan)


def overlay(photo: Picture, values: Tensor, grid: PatchGrid, ends: tuple[float, float]) -> Picture:
    """The map's colours over the image in grey."""
    low, high = ends
    spread = over_pixels(values.numpy(), grid, photo.shape[:2])
    return _tinted(_grey(photo), (spread - low) / (high - low or 1.0))


def covered(photo: Picture, kept: Tensor, grid: PatchGrid) -> Picture:
    """The image, covered where patches have left."""
    gone = over_pixels(kept.numpy(), grid, photo.shape[:2]) == 0
    return np.where(gone[..., None], (1 - GONE) * _grey(photo) + GONE * np.array(COVER) / 255, photo)


def _tinted(grey: Picture, share: NDArray[Any]) -> Picture:
    colours = _matplotlib().colormaps[COLOURS](np.nan_to_num(share))[..., :3]
    mixed: Picture = np.where(np.isnan(share)[..., None], grey, (1 - OPACITY) * grey + OPACITY * colours)
    return mixed


def _grey(photo: Picture) -> Picture:
    grey: Picture = np.repeat((photo @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2)
    return grey


def _enlarged(pixels: Picture, factor: int) -> Picture:
    larger: Picture = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    return larger


def _draw(figure: Any, left: int, top: int, width: int, pixels: Picture, title: str, _: Picture, ends: Any) -> None:
    _fit(figure, left, top, width, title)
    _place(figure, left, top + LINE, pixels)
    if ends is None:
        return
    below = top + LINE + len(pixels) + 4
    scale = np.broadcast_to(np.linspace(0, 1, width), (BAR, width))
    _place(figure, left, below, _tinted(np.full((BAR, width, 3), 0.5), scale))
    _write(figure, left, below + BAR, f"{ends[0]:.3g}")
    _write(figure, left + width, below + BAR, f"≥ {ends[1]:.3g}", ha="right")


def _place(figure: Any, left: int, top: int, pixels: Picture) -> None:
    # pixel for pixel: axes would resample
    figure.figimage(pixels, left, round(figure.bbox.height) - top - len(pixels), origin="upper")


def _write(figure: Any, left: int, top: int, text: str, **style: Any) -> Any:
    width, height = figure.bbox.width, figure.bbox.height
    # a dollar sign in a file name is no mathematics
    style = {"va": "top", "fontsize": LETTERS * 72 / DPI, "parse_math": False, **style}
    return figure.text(left / width, 1 - top / height, text, **style)


def _fit(figure: Any, left: int, top: int, width: int, text: str, **style: Any) -> None:
    """Writes a text, cut in the middle until it is no wider than that many pixels."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    written, shown = _write(figure, left, top, text, **style), len(text)
    while (wide := written.get_window_extent().width) > width and shown > 2:
        shown = min(int(shown * width / wide), shown - 1)
        head = shown // 2
        written.set_text(f"{text[:head]}…{text[len(text) - (shown - head - 1) :]}")


def _figure(width: int, height: int) -> Any:
    _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingLibrary(
            "pictures are drawn by matplotlib, which is not installed: pip install matplotlib"
        ) from error
    return matplotlib
