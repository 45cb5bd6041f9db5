"""Score maps as a page: pictures side by side, a slider over the layers, and what the schedule left of each picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from passes.network.patch_grid import PatchGrid
from passes.sites.importance import Lowest, Random, Shift
from rs_compile.pages import VIRIDIS, write_page
from rs_compile.schedule import Schedule
from rs_compile.side_by_side import SideBySide
from rs_compile.visualize.layers import ScoreMaps
from rs_compile.visualize.picture import COVER, Picture, colour_range, edges

_QUALITY = 92  # of the JPEG: no visible loss, a tenth of a PNG's bytes
_DIGITS = 4  # of each score
_DISTANCE = {"l2": "L2 distance", "l1": "L1 distance", "cosine": "cosine distance"}


def save_page(
    path: Path,
    model: str,
    names: Sequence[str],
    photos: Sequence[Picture],
    maps: ScoreMaps,
    schedule: Schedule,
    shift: Shift = Shift(),
    beside: SideBySide | None = None,
) -> None:
    """Writes a page with one slider over layers and sites; it opens from a file and loads nothing.

    Args:
        path: of the HTML file.
        model: what to call the model.
        names: of the images.
        photos: what the model saw, [height, width, 3] in 0..1, of `maps.size`.
        maps: of these images, in this order.
        schedule: that `maps.sites` are of.
        shift: that the maps show.
        beside: the model rewritten by the schedule beside the dense one, on these images.

    Raises:
        CompileError: the file cannot be written.
    """
    write_page(
        path,
        "maps.html",
        scripts=("maps.js",),
        model=model,
        maps=maps,
        schedule=schedule,
        about=meaning(shift, maps.unit),
        leaving=leaving(schedule, maps),
        beside=beside,
        drifts=_drifts(beside, len(names)),
        data=_content(names, photos, maps),
    )


def meaning(shift: Shift, unit: str) -> str:
    """What the score is, in two sentences."""
    if unit == "stage":
        said = "what the stage makes of a cell and what reaches it by the stage's first shortcut"
    elif shift.of == "block":
        said = "a token in front of the block and behind it"
    else:
        branch = "MLP" if shift.of == "mlp" else shift.of
        said = f"a token x and {'x + F(x)' if shift.with_skip else 'F(x)'}, where F is the block's {branch}"
    return (
        f"Representation shift is the {_DISTANCE[shift.metric]} between {said}: how much the network still does with "
        "that place of the picture. It needs no attention map."
    )


def leaving(schedule: Schedule, maps: ScoreMaps) -> list[str]:
    """What the schedule does, a sentence each; none without sites."""
    if not maps.sites:
        return []
    last = maps.sites[-1]
    said = []
    if schedule.merge:
        said.append(f"In {_listed(schedule.merge, 'block')} tokens merge, chosen by {schedule.by.compares}.")
    if schedule.keep or schedule.grid:
        what = "tokens" if maps.unit == "block" else "rows and columns"
        score, of = schedule.score, "lowest"
        if isinstance(score, Lowest):
            score, of = score.score, "highest"
        name = "shift" if isinstance(score, Shift) else score.kind.replace("-", " ")
        which = f"{what} leave at random" if isinstance(score, Random) else f"the {what} of the {of} {name} leave"
        said.append(f"After {_listed(schedule.keep or schedule.grid, maps.unit)} {which}.")
    count, left = last.of - last.others, last.left - last.others
    said.append(f"Of {count} {patches(maps)} {left}{' tokens' if schedule.merge else ''} are left at the end.")
    if last.others == 1:
        said.append("One more token, the class token, is no patch: it always stays and is not counted here.")
    elif last.others:
        said.append(
            f"{last.others} more tokens (class token, registers) are no patches: they stay and are not counted."
        )
    if len(maps.sites) > 1:
        said.append(
            f"From the second {maps.unit} on the schedule scores what is left, so it may choose otherwise than the map."
        )
    return said


def _listed(numbers: Iterable[int], unit: str) -> str:
    *most, last = map(str, numbers)
    return f"{unit}s {', '.join(most)} and {last}" if most else f"{unit} {last}"


def patches(maps: ScoreMaps) -> str:
    """What a map is made of, in words."""
    return "patches" if maps.unit == "block" else "cells"


def _drifts(beside: SideBySide | None, count: int) -> list[float | None]:
    """Of each image the drift of the first output."""
    return [None] * count if beside is None else list(beside.outputs[0].each)


def _content(names: Sequence[str], photos: Sequence[Picture], maps: ScoreMaps) -> dict[str, Any]:
    height, width = maps.size
    return {
        "unit": maps.unit,
        "patches": patches(maps),
        "score": maps.score,
        "attention": next((layer.attention_kind for layer in maps.layers if layer.attention is not None), None),
        "merges": any(bool(((s.stands >= 0) & ~s.kept).any()) for s in maps.sites),
        "leaves": any(bool((s.stands < 0).any()) for s in maps.sites),
        "height": height,
        "width": width,
        "palette": VIRIDIS,
        "cover": COVER,
        "images": [{"name": n, "source": _source(photo)} for n, photo in zip(names, photos, strict=True)],
        "layers": [
            {
                "index": layer.index,
                "where": layer.where,
                **_edges(layer.grid, maps.size),
                "shift": [_map(values) for values in layer.shift],
                "attention": None if layer.attention is None else [_map(values) for values in layer.attention],
            }
            for layer in sorted(maps.layers, key=lambda layer: layer.index)
        ],
        "sites": [
            {
                "index": site.index,
                "left": site.left - site.others,
                "of": site.of - site.others,
                **_edges(site.grid, maps.size),
                "stands": [stands.flatten().tolist() for stands in site.stands],
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
