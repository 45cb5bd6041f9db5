"""The demo's photographs and digits: `python -m bench.demo_data --out rs_compile/data/demo_pictures.safetensors`.

Photographs are scikit-image's, made smaller, all of them free to pass on (CC0); digits are scikit-learn's (UCI, Optical
Recognition of Handwritten Digits, CC BY 4.0). What is written is for testing: `bench.train_demo` trains on the other
digits and on other photographs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import skimage
import torch
from PIL import Image
from sklearn import datasets
from torch import Tensor

from bench.digits import Split, split_rows

PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": (
        "astronaut.png",
        "camera.png",
        "clock_motion.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "test": ("brick.png", "chelsea.png", "coffee.png"),
}
SIDES: dict[Split, tuple[int, ...]] = {"train": (110, 160, 230), "test": (160,)}  # the shorter one, in pixels


class Source(NamedTuple):
    """What pictures are made of: scans uint8 [n, 8, 8] in 0..16, their labels [n], photographs uint8 [H, W, 3]."""

    scans: Tensor
    labels: Tensor
    photographs: dict[str, Tensor]


def source(split: Split) -> Source:
    """The digits and photographs of one split; no digit and no photograph is in both."""
    digits, rows = datasets.load_digits(), split_rows(split)
    photographs = {f"{Path(n).stem}.{side}": _photograph(n, side) for n in PHOTOGRAPHS[split] for side in SIDES[split]}
    return Source(torch.from_numpy(digits.images[rows]).byte(), torch.from_numpy(digits.target[rows]), photographs)


def _photograph(name: str, side: int) -> Tensor:
    with Image.open(Path(skimage.__file__).parent / "data" / name) as photo:
        scale = side / min(photo.size)
        size = (round(photo.width * scale), round(photo.height * scale))
        return torch.from_numpy(np.array(photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    out = parser.parse_args().out
    found = source("test")
    tensors = {f"photograph.{name}": photo for name, photo in found.photographs.items()}
    tensors |= {"scans": found.scans, "labels": found.labels.byte()}
    about = {
        "photographs": "scikit-image: brick (CC0Textures), chelsea (S. van der Walt), coffee (R. Michetti); CC0",
        "scans": "UCI Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, CC BY 4.0, by scikit-learn",
    }
    safetensors.torch.save_file(tensors, out, metadata={"sources": json.dumps(about)})
    out.chmod(0o644)  # safetensors writes files that only their owner can read
    print(f"{len(found.scans)} digits, {len(found.photographs)} photographs, {out.stat().st_size / 1e3:.0f} kB: {out}")


if __name__ == "__main__":
    main()
