"""Fidelity: how far features drift from the dense model's, for every way to leave tokens out, at equal counts.

No labels are needed, so any pictures do; without --images they are scikit-image's photographs, three crops of each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from tabulate import tabulate
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from bench.tables.layer_plot import check_out, save
from bench.tables.measure import say
from bench.tables.options import Setting, chosen
from bench.tables.options import add_arguments as add_shared
from bench.tables.published import PITOME_CODE
from bench.tables.results import Results, Row, UsageError, environment
from rs_compile import (
    ClassAttention,
    Lowest,
    MeanAttention,
    PiToMe,
    Random,
    Schedule,
    Shift,
    Stream,
    ToMe,
    VidTLDR,
    Ward,
    ZeroTPrune,
    optimize,
    plan,
)
from rs_compile.models import build, read_image
from rs_compile.planning import plans
from rs_compile.search.methods import diffrate

Counts = Mapping[int, int]  # block -> how many tokens leave there
Ways = Mapping[str, Callable[[Counts, Mapping[int, float]], Schedule]]

# the paper's 20% after blocks 0, 3, 6 of 257 tokens; 30% later on; 5% and 7% after each of 12
DEFAULT: Sequence[Counts] = (
    {0: 51, 3: 41, 6: 33},
    {4: 77, 6: 54, 8: 38},
    dict.fromkeys(range(12), 13),
    dict.fromkeys(range(12), 18),
)
PRUNE: Ways = {
    "prune: MLP shift": lambda _, keep: Schedule(keep),
    "prune: MLP shift, L1": lambda _, keep: Schedule(keep, score=Shift(metric="l1")),
    "prune: MLP shift, cosine": lambda _, keep: Schedule(keep, score=Shift(metric="cosine")),
    "prune: attention shift": lambda _, keep: Schedule(keep, score=Shift(of="attention")),
    "prune: block shift": lambda _, keep: Schedule(keep, score=Shift(of="block")),
    "prune: MLP shift, lowest kept": lambda _, keep: Schedule(keep, score=Lowest()),
    "prune: class attention": lambda _, keep: Schedule(keep, score=ClassAttention()),
    "prune: mean attention": lambda _, keep: Schedule(keep, score=MeanAttention()),
    "prune: Zero-TPrune": lambda _, keep: Schedule(keep, score=ZeroTPrune()),
    "prune: random": lambda _, keep: Schedule(keep, score=Random()),
}
MERGE: Ways = {
    "ToMe": lambda r, _: Schedule(merge=r, by=ToMe(size_bias=False)),
    "ToMe, size bias": lambda r, _: Schedule(merge=r, by=ToMe()),
    "vid-TLDR": lambda r, _: Schedule(merge=r, by=VidTLDR(size_bias=False)),
    "vid-TLDR, size bias": lambda r, _: Schedule(merge=r, by=VidTLDR()),
    "vid-TLDR with MLP shift, size bias": lambda r, _: Schedule(merge=r, by=VidTLDR(Shift())),
    "vid-TLDR with attention shift, size bias": lambda r, _: Schedule(merge=r, by=VidTLDR(Shift(of="attention"))),
    "PiToMe, as its code": lambda r, _: Schedule(merge=r, by=PITOME_CODE),
    "PiToMe, size bias": lambda r, _: Schedule(merge=r, by=PiToMe()),
    "DiffRate, size bias": lambda r, _: diffrate(r),
    "stream": lambda r, _: Schedule(merge=r, by=Stream(size_bias=False)),
    "stream, size bias": lambda r, _: Schedule(merge=r),
    "Ward, size bias": lambda r, _: Schedule(merge=r, by=Ward()),
}
WAYS: Ways = {**PRUNE, **MERGE}
PHOTOGRAPHS = (
    "astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "hubble_deep_field.jpg", "ihc.png",
    "motorcycle_left.png", "rocket.jpg",
)  # fmt: skip
CROPS = 3
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="a timm model (default %(default)s)")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint", dest="weights", type=Path, metavar="FILE", help="weights; random ones if not given"
    )
    weights.add_argument("--pretrained", action="store_true", help="weights from timm's hub")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", default=224)
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures; scikit-image's if not given")
    parser.add_argument(
        "--counts",
        type=_counts,
        action="append",
        metavar="BLOCK:COUNT,...",
        help="how many tokens leave where, 0:51,3:41,6:33; repeat for further columns",
    )
    parser.add_argument("--ways", type=_some, default=list(WAYS), metavar="NUMBER,...", help=_listed())
    parser.add_argument("--out", type=Path, metavar="PNG", help="drift against MACs; a .svg or .pdf will do too")
    add_shared(parser, columns=("gflops",))


def run(args: argparse.Namespace) -> int:
    check_out(args.out)
    setting = Setting.of(args)
    model = build(
        args.model, img_size=args.img_size, num_classes=None, pretrained=args.pretrained, checkpoint=args.weights
    ).to(setting.device, setting.dtype)
    images = pictures(model, args.images, args.img_size, quick=args.quick).to(setting.device, setting.dtype)
    tokens, depth = _shape(model, images[:1])
    columns = (args.counts or _fitting(tokens, depth))[: 1 if args.quick else None]
    settings = {k: str(getattr(args, k)) for k in ("model", "weights", "pretrained", "img_size", "images", "dtype")}
    results = Results(args.json, environment("fidelity", settings | {"crops": len(images)}))
    batch = args.batch_size or 9
    say(f"{args.model}: the dense model on {len(images) // CROPS} pictures, {CROPS} crops of each")
    dense = _forward(model, images, batch)
    for counts in columns:
        _fill(results, model, images, dense, counts, args.ways, batch, tokens)
    rows = [row for counts in columns for way in args.ways if (row := results.row(_identity(way, counts)))]
    print(_table(rows, columns))
    where = args.images or "scikit-image's photographs"
    weights = args.weights or ("timm's hub" if args.pretrained else "none: random, so that the numbers mean nothing")
    print(
        f"mean cosine of the output to the dense model's, {len(images) // CROPS} pictures, {CROPS} crops of each "
        f"({where}); weights: {weights}.\n"
        f"In brackets: multiply-accumulates, G a picture; dense {rows[0]['gmacs_dense']:.3f}. Random: one draw."
    )
    if args.out is not None:
        save(plot(rows, columns), args.out)
    return 0


def _fill(
    results: Results,
    model: nn.Module,
    images: Tensor,
    dense: Tensor,
    counts: Counts,
    ways: Sequence[str],
    batch: int,
    tokens: int,
) -> None:
    """The rows of one column, all from one capture."""
    lacking = [way for way in ways if not results.row(_identity(way, counts))]
    if len(lacking) < len(ways):
        say(f"{_name(counts)}: {len(ways) - len(lacking)} rows are in --json already")
    if not lacking:
        return
    keep = _keep(counts, tokens)
    handles = [optimize(model, WAYS[way](counts, keep), backend="eager", drop_unread=False) for way in lacking]
    for way, handle, report in zip(lacking, handles, plans(handles, images[:batch]), strict=True):
        torch.manual_seed(0)  # of random selection
        drifted = _forward(handle, images, batch)
        cosine = torch.cosine_similarity(drifted.double(), dense.double(), dim=-1)
        values = {
            "model": type(model).__name__,
            "gflops": report.flops / 1e9,
            "gmacs": report.macs / 1e9,
            "gmacs_dense": report.macs_dense / 1e9,
            "cosine": float(cosine.mean()),
            "cosine_lowest": float(cosine.min()),
            "pictures": len(images) // CROPS,
            "crops": len(images),
        }
        results.fill(_identity(way, counts), values)
        say(f"{_name(counts)}: {way} {values['cosine']:.4f} [{values['gmacs']:.2f}]")


@torch.no_grad()
def _forward(model: nn.Module, images: Tensor, batch: int) -> Tensor:
    outputs = [model(part) for part in images.split(batch)]
    if not isinstance(outputs[0], Tensor) or outputs[0].dim() != 2:
        raise UsageError("the model's output is not [batch, features]; fidelity compares one vector a picture")
    return torch.cat(outputs)


def pictures(model: nn.Module, folder: Path | None, side: int, quick: bool = False) -> Tensor:
    """Three square crops of every picture along its longer side, as the model wants them: [B, 3, side, side].

    Raises:
        UsageError: the folder has no pictures, or scikit-image is not there.
    """
    if folder is not None:
        if not folder.is_dir():
            raise UsageError(f"--images {folder} is no folder")
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise UsageError(f"--images {folder} has no pictures ({', '.join(sorted(SUFFIXES))})")
    else:
        paths = [photograph(name) for name in PHOTOGRAPHS]
    config = resolve_model_data_config(model) | {"input_size": (3, side, side), "crop_pct": 1.0}
    transform = create_transform(**config)
    images = [crop for path in paths[: 2 if quick else None] for crop in _crops(read_image(path, "RGB"))]
    return torch.stack([transform(image) for image in images])


def photograph(name: str) -> Path:
    """A file of scikit-image's own data.

    Raises:
        UsageError: scikit-image is not there.
    """
    try:
        import skimage
    except ImportError:
        raise UsageError("scikit-image's photographs are not here; pip install scikit-image") from None
    return Path(skimage.__file__).parent / "data" / name


def _crops(image: Image.Image) -> list[Image.Image]:
    """Three squares: at the start, the middle and the end of a picture, three quarters of a square one."""
    width, height = image.size
    side = min(width, height) if width != height else width * 3 // 4
    at = [i / (CROPS - 1) for i in range(CROPS)]
    corners = [(round((width - side) * t), round((height - side) * t)) for t in at]
    return [image.crop((x, y, x + side, y + side)) for x, y in corners]


def _shape(model: nn.Module, sample: Tensor) -> tuple[int, int]:
    """How many tokens the first block sees, and how many blocks there are."""
    blocks = plan(model, {}, sample).blocks
    if not blocks or blocks[0].tokens_in is None:
        raise UsageError("the model has no blocks on [batch, tokens, channels]; rs-compile explain says what was found")
    return int(blocks[0].tokens_in), len(blocks)


def _keep(counts: Counts, tokens: int) -> dict[int, float]:
    """Keep ratios that leave out exactly these counts."""
    keep = {}
    for block, count in sorted(counts.items()):
        if count >= tokens:
            raise UsageError(f"--counts: block {block} has {tokens} tokens, and {count} are to leave")
        keep[block] = round((tokens - count - 0.5) / tokens, 9)  # int() takes the half token off again
        tokens -= count
    return keep


def _fitting(tokens: int, depth: int) -> list[Counts]:
    """The default counts, in proportion where the model has another number of tokens or blocks."""
    return [
        {block: max(1, round(count * tokens / 257)) for block, count in counts.items() if block < depth}
        for counts in DEFAULT
    ]


def _identity(way: str, counts: Counts) -> dict[str, str]:
    return {"method": way, "counts": ",".join(f"{block}:{count}" for block, count in counts.items())}


def _name(counts: Counts) -> str:
    if len(set(counts.values())) == 1:
        return f"{next(iter(counts.values()))} after each of {len(counts)}"
    return f"{','.join(map(str, counts.values()))} after {','.join(map(str, counts))}"


def _table(rows: Sequence[Row], columns: Sequence[Counts]) -> str:
    names = [_identity("", counts)["counts"] for counts in columns]
    lines = []
    for way in dict.fromkeys(row["method"] for row in rows):
        of = {row["counts"]: row for row in rows if row["method"] == way}
        lines.append([way, *(f"{of[n]['cosine']:.4f} [{of[n]['gmacs']:.2f}]" if n in of else "" for n in names)])
    return tabulate(lines, ["", *map(_name, columns)], disable_numparse=True)


def plot(rows: Sequence[Row], columns: Sequence[Counts]) -> Figure:
    """Drift, 1 - cosine, against MACs; a line a method."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axis = figure.subplots()
    for i, way in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = np.array(sorted((row["gmacs"], 1 - row["cosine"]) for row in rows if row["method"] == way))
        style = "--" if way in PRUNE else "-"
        axis.plot(*points.T, style, color=f"C{i % 10}", marker="osd^vxP*"[i % 8], markersize=5, label=way)
    axis.set(xlabel="multiply-accumulates a picture, G", ylabel="drift: 1 - cosine to the dense model", yscale="log")
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize="x-small")
    return figure


def _counts(text: str) -> dict[int, int]:
    try:
        pairs = [part.split(":") for part in text.split(",")]
        counts = {int(block): int(count) for block, count in pairs}
    except ValueError:
        counts = {}
    if not counts or any(block < 0 or count < 1 for block, count in counts.items()):
        raise argparse.ArgumentTypeError(f"{text!r} is not BLOCK:COUNT,..., like 0:51,3:41,6:33")
    return counts


def _some(text: str) -> list[str]:
    names = list(WAYS)
    return [names[int(number) - 1] for number in chosen([str(i + 1) for i in range(len(names))])(text)]


def _listed() -> str:
    return "some of " + "; ".join(f"{i + 1} {name}" for i, name in enumerate(WAYS))
