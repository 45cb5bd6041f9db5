"""Pictures of a small ViT's graph before and after the main passes, as SVG files for the documentation.

They are drawn from the graphs that the passes leave, the same that `optimize(..., debug=DIR)` writes as text; but for
`before-after.svg`, the README's, which is a drawing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import timm
import torch
from torch import nn
from torch.fx import GraphModule, Node

import rs_compile
from bench.graphs.drawing import svg
from bench.graphs.overview import overview
from bench.graphs.recorded import bands, recording, rows
from bench.tables.methods import with_attention
from passes.graph.splice import ORIGIN
from passes.network.branches import blocks_of, find_branches, module_path

SIDE, DEPTH, WIDTH, HEADS = 64, 2, 40, 2  # no size but the sequence's length is 17 or 12
TOKENS, KEPT = 17, 12
COLOURS = {"all": TOKENS, "kept": KEPT, "one": 1}
KEYS = {"all": f"all {TOKENS} tokens", "kept": f"{KEPT} tokens", "one": "class token alone", "none": "no tokens"}
SITE = ("score", "select", "gather", "restore", "merge", "sizes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("docs/img"), metavar="DIR", help="where (default: docs/img)")


def run(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    drawn = {f"graph-{name}": text for name, text in pictures().items()}
    for name, text in {"before-after": overview(), **drawn}.items():
        path = args.out / f"{name}.svg"
        path.write_text(text)
        print(path, file=sys.stderr)
    return 0


def model() -> nn.Module:
    """A ViT of two blocks whose attention is written out, as many models' is."""
    torch.manual_seed(0)
    made = timm.create_model(
        "vit_tiny_patch16_224", depth=DEPTH, embed_dim=WIDTH, num_heads=HEADS, img_size=SIDE, num_classes=10
    )
    return with_attention(made.eval(), fused=False)


def pictures() -> dict[str, str]:
    """SVG by name of file."""
    images, pruned = torch.randn(2, 3, SIDE, SIDE), {0: 0.7}
    vit = model()
    with recording() as classes:
        rs_compile.plan(vit, pruned, images)
    with recording() as features:
        rs_compile.plan(vit, pruned, images, method="forward_features")
    with recording() as merged:
        rs_compile.plan(vit, rs_compile.Schedule(merge={0: TOKENS - KEPT}, by=rs_compile.Stream()), images)
    lowered = classes["LowerAttention"]
    named = bands(lowered)
    first, second = blocks_of(find_branches(lowered))
    assert first.attention is not None and second.attention is not None

    def draw(
        title: str, gm: GraphModule, *wanted: Wanted, views: bool = False, together: Collection[str] = SITE
    ) -> str:
        drawn = rows(gm, named, lambda node: any(want(node) for want in wanted), views, together)
        return svg(title, drawn, COLOURS, KEYS)

    attention, mlp, then = (_on(named, part) for part in ("block 0: attention", "block 0: MLP", "block 1: attention"))
    sums = _named(first.entry, first.attention.add, first.output)
    shifted = _named(first.attention.add, first.mlp.term, first.output)
    behind, rest = _on(named, "block 1"), _path("norm", "head")
    ends = _named(second.attention.add, second.output)
    end = [_path("blocks.1"), behind, rest, _end]
    return {
        "attention-captured": draw("Attention as captured", classes["Canonicalise"], attention, views=True),
        "attention-lowered": draw("After LowerAttention", lowered, attention, views=True),
        "block": draw("Residual branches found", lowered, attention, mlp, sums, behind, ends),
        "inserted": draw("After InsertSelection", classes["InsertSelection"], shifted, mlp, _site, then, together=()),
        "retargeted": draw("After RetargetTokens", classes["RetargetTokens"], shifted, _site, then, _path("blocks.1")),
        "compact": draw("Restored: a class token goes on", classes["RestoreTokens"], shifted, _site, *end),
        "restored": draw("Restored: features go on", features["RestoreTokens"], shifted, _site, *end),
        "read": draw("Before DropUnread", classes["ApplySizes"], *end),
        "unread": draw("After DropUnread", classes["DropUnread"], _unread, *end),
        "merged": draw("After InsertMerge", merged["InsertMerge"], _named(first.output), _site, then),
    }


Wanted = Callable[[Node], bool]


def _site(node: Node) -> bool:
    return ORIGIN.get(node) in SITE


def _unread(node: Node) -> bool:
    return ORIGIN.get(node) == "unread"


def _on(named: Mapping[str, str], part: str) -> Wanted:
    """On a branch of a block."""
    return lambda node: named.get(module_path(node), "").startswith(part)


def _path(*paths: str) -> Wanted:
    """Captured in one of these modules."""
    return lambda node: module_path(node) in paths


def _named(*nodes: Node) -> Wanted:
    """One of these, in later graphs too."""
    names = {node.name for node in nodes}
    return lambda node: node.name in names


def _end(node: Node) -> bool:
    """Outside of all modules behind the last block: where the model takes the class token, and the output."""
    return node.op == "output" or (node.name.startswith("select") and not module_path(node) and not _site(node))
