"""`rs-compile visualize`: from image files to a picture or a page, and a table of the scores' ranges."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from passes.graph.base import CompileError
from passes.graph.codes import Code
from passes.sites.importance import Shift
from rs_compile.arguments import LAYERS
from rs_compile.compiling import Backend
from rs_compile.models import load_images
from rs_compile.optimize import optimize
from rs_compile.schedule import Schedule
from rs_compile.side_by_side import SideBySide
from rs_compile.visualize.layers import Say, ScoreMaps
from rs_compile.visualize.maps import score_maps
from rs_compile.visualize.page import save_page
from rs_compile.visualize.picture import Picture, save_picture

_ROUNDS = 5  # of timing
_FORMATS = (".png", ".html")


@dataclass(frozen=True)
class Visualized:
    """What was drawn: `str()` is a table of the scores' ranges, `to_json()` has every score."""

    names: tuple[str, ...]
    maps: ScoreMaps
    output: Path
    beside: SideBySide | None = None  # with a schedule: drift and speed on these images

    def __str__(self) -> str:
        ranges = ["median", "highest"]
        heads = ["image", self.maps.unit, f"{self.maps.score}: lowest", *ranges, "attention: lowest", *ranges]
        rows = [
            [
                name,
                layer.index,
                *_range(layer.shift[i]),
                *_range(None if layer.attention is None else layer.attention[i]),
            ]
            for i, name in enumerate(self.names)
            for layer in self.maps.layers
        ]
        lines = [tabulate(rows, heads, disable_numparse=True)]
        lines += [
            f"after {self.maps.unit} {s.index}: {s.left} of {s.of} {self.maps.cells} are left" for s in self.maps.sites
        ]
        if self.beside is not None:
            lines.append(str(self.beside))
        return "\n".join([*lines, f"written: {self.output}"])

    def to_json(self) -> str:
        """By block the grid [rows, columns] and the maps [image][row][column]; by site which patches are left and
        which one stands for each (-1: it has left); with a schedule drift and speed."""
        layers = [
            {
                "index": layer.index,
                "where": layer.where,
                "grid": layer.grid.shape,
                "shift": _nested(layer.shift),
                "attention": _nested(layer.attention),
                "attention_kind": layer.attention_kind,
            }
            for layer in self.maps.layers
        ]
        sites = [
            {
                "index": s.index,
                "grid": s.grid.shape,
                "left": s.left,
                "of": s.of,
                "kept": s.kept.tolist(),
                "stands": s.stands.tolist(),
            }
            for s in self.maps.sites
        ]
        content: dict[str, Any] = {"images": self.names, "unit": self.maps.unit, "score": self.maps.score}
        content |= {"size": self.maps.size, "beside": self.beside.to_dict() if self.beside is not None else None}
        return json.dumps(content | {"layers": layers, "sites": sites})


def visualize(
    model: nn.Module,
    name: str,
    paths: Sequence[Path],
    output: Path,
    layers: Sequence[int] | None,
    schedule: Schedule,
    img_size: int | None,
    say: Say,
    backend: Backend = "eager",
) -> Visualized:
    """Draws the score maps of image files.

    Args:
        model: of timm.
        name: what to call it.
        paths: of the images.
        output: where the picture or page is written; see `check_output`.
        layers: blocks, 0-based; None for all.
        schedule: the score to show, and what leaves by it, if anything.
        img_size: side of the images in pixels; None for the model's own.
        say: called with a line of text at each stage.
        backend: what runs both sides where they are timed, with a schedule.

    Raises:
        CompileError: an image, a layer or the schedule does not fit, or the file cannot be written.
    """
    check_output(output)
    images = load_images(paths, model, img_size)
    like = next(model.parameters())
    inputs = images.to(like.device, like.dtype)
    shift = schedule.score if isinstance(schedule.score, Shift) else Shift()
    maps = score_maps(model, inputs, layers, schedule=schedule, shift=shift, progress=say)
    beside = None
    if schedule.prunes:
        beside = optimize(model, schedule, backend=backend, progress=say).compare(inputs, rounds=_ROUNDS)
    photos, names = seen(images, model), tuple(str(path) for path in paths)
    say(f"drawing {output}")
    if output.suffix.lower() == ".html":
        short = tuple(path.name for path in paths)
        shown = short if len(set(short)) == len(short) else names
        save_page(output, name, shown, photos, maps, schedule, shift, beside)
        return Visualized(names, maps, output, beside)
    try:
        save_picture(output, names, photos, maps)
    except OSError as error:
        raise CompileError(f"-o {output}: {error.strerror}; nothing was drawn", code=Code.COMMAND) from error
    return Visualized(names, maps, output, beside)


def check_output(output: Path) -> None:
    """Refuses, before minutes of work, where no picture can be written.

    Raises:
        CompileError: neither PNG nor HTML, or no such directory.
    """
    if output.suffix.lower() not in _FORMATS:
        raise CompileError(f"-o {output}: a picture ends in .png, a page in .html; name the file so", code=Code.COMMAND)
    if output.is_dir() or not output.parent.is_dir():
        raise CompileError(
            f"-o {output}: no file can be written there; give one in a directory that exists", code=Code.COMMAND
        )


def layers_for(output: Path, schedule: Schedule) -> str:
    """Which layers are drawn if none are named: on a page all; in a picture those that the schedule cuts behind."""
    sites = sorted({*schedule.keep, *schedule.merge, *schedule.grid})
    return "all" if output.suffix.lower() == ".html" else ",".join(map(str, sites)) or LAYERS


def parse_layers(text: str) -> list[int] | None:
    """Reads "1,5,9"; None for "all".

    Raises:
        CompileError: something else.
    """
    if text.strip() == "all":
        return None
    parts = [part.strip() for part in text.split(",")]
    if odd := [part for part in parts if not (part.isascii() and part.isdigit())]:
        raise CompileError(
            f"--layers {text}: {odd[0]!r} is no block; write indices counted from 0, 1,5,9, or all", code=Code.COMMAND
        )
    return list(dict.fromkeys(map(int, parts)))


def seen(images: Tensor, model: nn.Module) -> list[Picture]:
    """What a timm model sees, for the eye: its normalised inputs [B, C, H, W] as [H, W, 3] in 0..1."""
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1)[: images.shape[1]] for key in ("mean", "std"))
    pixels = (images.cpu() * std + mean).clamp(0, 1).expand(-1, 3, -1, -1)
    return [np.asarray(photo.permute(1, 2, 0)) for photo in pixels]


def _range(values: Tensor | None) -> list[str]:
    if values is None:
        return ["", "", ""]
    finite = values[values.isfinite()]
    return [f"{float(v):.4g}" for v in (finite.min(), finite.median(), finite.max())]


def _nested(values: Tensor | None) -> Any:
    """Nested lists, with None for NaN, which JSON does not have."""
    if values is None:
        return None
    return [[[v if v == v else None for v in row] for row in image] for image in values.tolist()]
