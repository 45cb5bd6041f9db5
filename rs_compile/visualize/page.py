"""Score maps as one HTML file that needs nothing else: `page.html` with the images and the scores filled in."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from passes.network.patch_grid import PatchGrid
from rs_compile.visualize.layers import ScoreMaps
from rs_compile.visualize.picture import COVER, Picture, colour_range, edges, palette

_PLACE = "__DATA__"
_QUALITY = 92  # of the JPEG: no visible loss, a tenth of a PNG's bytes
_DIGITS = 4  # of each score
_STEPS = 64  # colours


def save_page(path: Path, model: str, names: Sequence[str], photos: Sequence[Picture], maps: ScoreMaps) -> None:
    """Writes a page with a slider over layers and one over sites; it opens from a file and loads nothing.

    Args:
        path: of the HTML file.
        model: what to call the model.
        names: of the images.
        photos: what the model saw, [height, width, 3] in 0..1, of `maps.size`.
        maps: of these images, in this order.

    Raises:
        MissingLibrary: matplotlib, which has the colours, is not installed.
        OSError: the file cannot be written.
    """
    template = files("rs_compile.visualize").joinpath("page.html").read_text(encoding="utf-8")
    before, after = template.split(_PLACE)
    path.write_text(before + embedded(_content(model, names, photos, maps)) + after, encoding="utf-8")


def embedded(content: Any) -> str:
    """JSON that can stand inside a <script> element, whatever text it holds."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    # inside strings only, where JSON reads the escape as the same character
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _content(model: str, names: Sequence[str], photos: Sequence[Picture], maps: ScoreMaps) -> dict[str, Any]:
    height, width = maps.size
    return {
        "model": model,
        "about": "Photographs as the model saw them, resized and cropped; scores of the model with nothing pruned.",
        "unit": maps.unit,
        "cells": maps.cells,
        "score": maps.score,
        "attention": next((layer.attention_kind for layer in maps.layers if layer.attention is not None), None),
        "height": height,
        "width": width,
        "palette": palette(_STEPS),
        "cover": COVER,
        "images": [{"name": n, "source": _source(photo)} for n, photo in zip(names, photos, strict=True)],
        "layers": [
            {
                "index": layer.index,
                **_edges(layer.grid, maps.size),
                "shift": [_map(values) for values in layer.shift],
                "attention": None if layer.attention is None else [_map(values) for values in layer.attention],
            }
            for layer in maps.layers
        ],
        "sites": [
            {
                "index": site.index,
                "left": site.left,
                "of": site.of,
                **_edges(site.grid, maps.size),
                "kept": [{"values": [int(left) for left in kept.flatten()]} for kept in site.kept],
            }
            for site in maps.sites
        ],
    }


def _edges(grid: PatchGrid, size: tuple[int, int]) -> dict[str, list[int]]:
    return {"rows": edges(grid.rows, size[0]), "columns": edges(grid.columns, size[1])}


def _map(values: Tensor) -> dict[str, Any]:
    low, high = colour_range(values)
    flat = values.flatten()
    rounded = [_rounded(float(v)) if bool(v.isfinite()) else None for v in flat]
    return {"low": _rounded(low), "high": _rounded(high), "values": rounded}


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _source(photo: Picture) -> str:
    file = io.BytesIO()
    pixels = (photo * 255).round().astype("uint8")
    Image.fromarray(pixels).save(file, format="JPEG", quality=_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
