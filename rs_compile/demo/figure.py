"""Three of the demo's pictures: the score of each patch, and which are left after each block where tokens leave."""

from __future__ import annotations

import io

import numpy as np
import torch

from rs_compile.demo.model import load_pretrained_demo_vit
from rs_compile.demo.pictures import demo_pictures
from rs_compile.demo.run import BLOCKS, pruned
from rs_compile.visualize.maps import score_maps
from rs_compile.visualize.picture import Picture, colour_range, covered, overlay

SHOWN = (3, 8, 12)  # of the test pictures: one on each photograph
KEEP = 0.7
ENLARGED = 4
CELL = 1.5  # inches


@torch.no_grad()
def drawn() -> bytes:
    """A PNG: a row a picture."""
    from matplotlib.figure import Figure

    model, everything = load_pretrained_demo_vit(), demo_pictures()
    inputs, labels = everything.inputs[list(SHOWN)], everything.labels[list(SHOWN)]
    maps = score_maps(model, inputs, list(BLOCKS[:1]), schedule=pruned(KEEP))
    layer, named = maps.layers[0], model(inputs).argmax(1)
    figure = Figure(figsize=(CELL * (2 + len(BLOCKS)), CELL * len(SHOWN) + 0.35), dpi=130, layout="constrained")
    grid = figure.subplots(len(SHOWN), 2 + len(BLOCKS), squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for row, image in zip(grid, range(len(SHOWN)), strict=True):
        photo: Picture = np.asarray((inputs[image].permute(1, 2, 0) + 1) / 2).clip(0, 1)
        scores = layer.shift[image]
        cells = [
            ("picture", photo),
            (f"shift, block {layer.index}", overlay(photo, scores, layer.grid, colour_range(scores))),
            *((f"left after {s.index}: {s.left} of {s.of}", covered(photo, s.kept[image], s.grid)) for s in maps.sites),
        ]
        for axes, (title, pixels) in zip(row, cells, strict=True):
            axes.imshow(np.kron(pixels, np.ones((ENLARGED, ENLARGED, 1))), interpolation="nearest")
            if image == 0:
                axes.set_title(title, fontsize=8)
        row[0].set_ylabel(f"a {labels[image]}, named {named[image]}", fontsize=8)
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()
