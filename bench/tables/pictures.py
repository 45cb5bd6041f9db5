"""Score maps over pictures, for figures 4, 6 and 7: by `rs-compile visualize` with the paper's models and layers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from bench.tables.fidelity import photograph
from bench.tables.measure import say
from bench.tables.options import usable
from rs_compile import Schedule
from rs_compile.arguments import DTYPES as FLOATS
from rs_compile.commands import DTYPES
from rs_compile.models import build
from rs_compile.visualize.command import check_output, parse_layers, visualize

SHOWN = ("astronaut.png", "chelsea.png", "coffee.png")


@dataclass
class Pictures:
    """A figure of score maps, as a command.

    Args:
        model: the paper's, by timm's name.
        layers: blocks or stages, counted from 0.
        schedule: whose operation is shown.
    """

    model: str
    layers: str
    schedule: Schedule

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="scikit-image's if not given")
        weights = parser.add_mutually_exclusive_group()
        weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights; random ones if not given")
        weights.add_argument("--pretrained", action="store_true", help="weights from timm's hub")
        parser.add_argument("--model", default=self.model, help="a timm model (default %(default)s)")
        parser.add_argument("--layers", default=self.layers, help="counted from 0, or all (default %(default)s)")
        parser.add_argument("--img-size", type=int, metavar="PIXELS")
        parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 (default cpu)")
        parser.add_argument("--dtype", choices=FLOATS, default="float32")
        parser.add_argument("--quick", action="store_true", help="one picture")
        parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".png or .html")
        parser.add_argument("--json", type=Path, metavar="FILE", help="every score")

    def run(self, args: argparse.Namespace) -> int:
        check_output(args.output)
        images = args.images or [photograph(name) for name in SHOWN]
        model = build(args.model, img_size=args.img_size, pretrained=args.pretrained, checkpoint=args.checkpoint)
        model = model.to(usable(args.device), DTYPES[args.dtype])
        layers = parse_layers(args.layers)
        images = images[:1] if args.quick else images
        result = visualize(model, args.model, images, args.output, layers, self.schedule, args.img_size, say)
        print(result)
        if not (args.pretrained or args.checkpoint):
            print("random weights: the maps mean nothing; give --checkpoint FILE or --pretrained.")
        if args.json is not None:
            args.json.write_text(result.to_json() + "\n")
        return 0
