"""The coverage table: what it says of a few families is so, and its check can tell right from wrong."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import oracle
import pytest
import timm
import torch
import transformers
from torch import nn

import rs_compile
from bench.coverage import check as checking
from bench.coverage.check import BROKEN, FAULT, GRID, PRUNED, REFUSED, WRONG, Row, call, check
from bench.coverage.command import table
from bench.coverage.oracle import find_layers, prune_by_hand
from bench.coverage.subject import Subject, subjects

TABLE = Path(__file__).parents[1] / "COVERAGE.md"
HEADS = ["family", "model", "blocks", "prunable", "result", "difference", "time", "why not"]
FAST = [
    ("timm", "deit_tiny_patch16_224"),
    ("timm", "convit_tiny"),
    ("timm", "vit_srelpos_small_patch16_224"),
    ("timm", "xcit_nano_12_p8_224"),
    ("timm", "resnet10t"),
    ("transformers", "BertModel"),
    ("transformers", "Wav2Vec2Model"),
    ("torchvision", "vit_b_16"),
    ("open_clip", "ViT-B-32"),
]


@cache
def rows() -> dict[tuple[str, str], dict[str, str]]:
    """The table's rows by library and model."""
    found, library = {}, ""
    for line in TABLE.read_text().splitlines():
        if line.startswith("## "):
            library = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
        if library and len(cells) == len(HEADS) and cells != HEADS and not cells[0].startswith("---"):
            found[library, cells[1]] = dict(zip(HEADS, cells, strict=True))
    return found


@pytest.mark.parametrize(
    ("library", "name"), [FAST[0], FAST[4], *(pytest.param(*f, marks=pytest.mark.slow) for f in FAST[1:4] + FAST[5:])]
)
def test_the_table_is_true(library: str, name: str) -> None:
    said = rows()[library, name]
    row = check(next(s for s in subjects(library) if s.name == name))
    assert row["result"] == said["result"].removesuffix(", compiled").removesuffix(", by the block's shift"), row
    assert (str(row.get("blocks", "")), str(row.get("prunable", ""))) == (said["blocks"], said["prunable"])
    if row["result"] == REFUSED:
        assert "in the model:" in row["detail"] and "way out:" in row["detail"]


def test_nothing_in_the_table_is_wrong() -> None:
    results = {key: row["result"].removesuffix(", compiled") for key, row in rows().items()}
    assert list(results.values()).count(PRUNED) >= 134
    assert not {key for key, result in results.items() if result in (WRONG, FAULT, BROKEN)}
    assert all(row["why not"] for row in rows().values() if row["result"] == REFUSED)


def test_the_table_is_what_the_command_prints() -> None:
    row = {"library": "timm", "family": "f", "name": "m", "blocks": 3, "prunable": 2, "result": PRUNED, "error": 1e-9}
    refused = {"library": "timm", "family": "g", "name": "n", "result": REFUSED, "detail": "op: a | b\n  way out: c"}
    text = table([row, refused])
    assert [cell.strip() for cell in text.splitlines()[-2].split("|")[1:-1]] == [
        "f",
        "m",
        "3",
        "2",
        PRUNED,
        "1e-09",
        "",
        "",
    ]
    assert text.splitlines()[-1].count("op: a \\| b") == 1 and "way out" not in text


@pytest.mark.parametrize("of", ["mlp", "block"])
@pytest.mark.parametrize("prefix", [1, 0])
def test_masking_by_hand_is_gathering_by_hand(prefix: int, of: Literal["mlp", "block"]) -> None:
    """The table's oracle, which leaves tokens in place, against the one of the tests, which takes them out."""
    pool: dict[str, Any] = {} if prefix else {"class_token": False, "global_pool": "avg"}
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5, **pool).eval().double()
    oracle.randomise(model)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    layers = find_layers(model, call(model, images), 3)
    assert [y.path for y in layers] == ["blocks.0", "blocks.1", "blocks.2"] and layers[0].length == 16 + prefix
    keep = {0: 0.7, 1: 0.5}
    mine = prune_by_hand(model, call(model, images), layers, keep, (prefix, 0), of=of)
    with torch.no_grad():
        other = oracle.timm_vit(model, images, oracle.Pruning(keep, of, protected=prefix)).outputs["output"]
    torch.testing.assert_close(mine, other)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _tiny(build: Any = None) -> Subject:
    def vit() -> nn.Module:
        return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)

    return Subject("timm", "vit", "tiny", build or vit, lambda batch: torch.randn(batch, 3, 64, 64))


class Windows(nn.Module):
    """Attention in windows of four tokens."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        out: torch.Tensor = self.attn(x.reshape(-1, 4, x.shape[-1])).reshape(x.shape)
        return out


def test_tokens_back_before_a_window_are_back_in_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        options = {"class_token": False, "global_pool": "avg", "num_classes": 5}
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=5, **options)
        model.blocks[2].attn = Windows(model.blocks[2].attn)
        return model

    row = check(_tiny(build))
    assert (row["result"], row["prunable"], row["sites"]) == (PRUNED, 4, [0, 3]), row
    monkeypatch.setattr(checking, "prune_by_hand", lambda *given: prune_by_hand(*given[:-2], (), given[-1]))
    assert check(_tiny(build))["result"] == WRONG


def test_another_score_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(_tiny())["result"] == PRUNED

    real = rs_compile.Schedule

    def other(**options: Any) -> rs_compile.Schedule:
        return real(**{**options, "score": rs_compile.Shift(with_skip=True)})

    monkeypatch.setattr(checking.rs_compile, "Schedule", other)
    row = check(_tiny())
    assert row["result"] == WRONG and "hand-made twin" in row["detail"]


def _flattened() -> Subject:
    """Its blocks hold [B, H * W, C], and a map leaves it."""
    common = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "sr_ratios": [4, 2]}
    common |= {"num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    return Subject(
        "transformers",
        "tiny",
        "tiny",
        lambda: transformers.SegformerModel(transformers.SegformerConfig(**common)),
        lambda count: torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
    )


@pytest.mark.parametrize(
    "subject", [next(s for s in subjects("timm") if s.name == "resnet10t"), _flattened()], ids=["pooled", "map"]
)
def test_another_choice_of_rows_is_found_out(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(subject)
    assert found["result"] == GRID and found["error"] < 1e-9

    real = rs_compile.Schedule
    monkeypatch.setattr(checking.rs_compile, "Schedule", lambda grid: real(grid=grid, score=rs_compile.Lowest()))
    row = check(subject)
    assert row["result"] == WRONG and "hand-made twin" in row["detail"]


def test_another_shape_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking.rs_compile, "optimize", lambda model, *a, **k: lambda *x, **y: model(*x, **y)[:, :-1])
    assert check(_tiny())["result"] == WRONG


def test_a_fault_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any, **__: Any) -> Row:
        raise ValueError("boom")

    monkeypatch.setattr(checking, "_by_hand", fault)
    row = check(_tiny())
    assert (row["result"], row["detail"], row["blocks"]) == (FAULT, "ValueError: boom", 3)
