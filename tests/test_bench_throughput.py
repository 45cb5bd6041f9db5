"""`python -m bench throughput | costs`: rows, limits and the journal, on small stand-ins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bench.__main__ import main
from bench.tables.methods import ATTENTION, BASE, COMPILED, COMPILED_WRITTEN, OURS, STREAM
from bench.throughput.networks import NETWORKS
from bench.throughput.picture import plot
from bench.throughput.sweep import NAMES, methods_of
from rs_compile import Schedule, plan


def rows_of(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return found


@pytest.mark.slow
def test_a_sweep_its_journal_and_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "rows.json", tmp_path / "speed.png"
    options = ["throughput", "--quick", "--methods", f"{BASE},{OURS}", "--json", str(file)]
    swept = [*options, "--models", "DeiT-S", "--keeps", "0.8,0.5", "--batches", "1,2", "--out", str(picture)]
    assert main(swept) == 0
    rows = rows_of(file)
    assert len(rows) == 2 * 4, "two batch sizes: the baseline, eager attention, ours twice"
    for row in rows:
        assert row["of_limit"] == pytest.approx(row["speedup"] / row["macs_ratio"])
        assert len(row["rounds_seconds"]) == 2
        assert row["method"] == OURS or row["macs_ratio"] == 1
    network = NETWORKS["DeiT-S"]
    wanted = plan(network.make(True), dict.fromkeys((0, 3, 6), 0.5), network.inputs(1, True), drop_unread=False)
    ours = [row for row in rows if row.get("keep") == 0.5]
    assert [(r["macs"], r["macs_ratio"]) for r in ours] == [(wanted.macs, wanted.macs_dense / wanted.macs)] * 2
    text = capsys.readouterr().out
    assert "numbers mean nothing" in text and text.count("ours, keep 0.5") == 2
    with Image.open(picture) as image:
        assert image.width > 600
    # a second run goes on: a model more, and what was measured stays as it was
    assert main([*options, "--models", "DeiT-S,DeiT-T", "--keeps", "0.8", "--batches", "1"]) == 0
    again = rows_of(file)
    assert again[: len(rows)] == rows
    assert [(row["model"], row["method"]) for row in again[len(rows) :]] == [
        ("DeiT-T", COMPILED),  # always there
        ("DeiT-T", BASE),
        ("DeiT-T", OURS),
    ]


def test_counts_rounded_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    options = ["--quick", "--models", "DeiT-S", "--methods", OURS, "--keeps", "0.5", "--rounds", "1"]
    assert main(["throughput", *options, "--multiples", "1,6", "--json", str(file)]) == 0
    network = NETWORKS["DeiT-S"]
    schedule = Schedule(dict.fromkeys((0, 3, 6), 0.5), multiple_of=6)
    wanted = plan(network.make(True), schedule, network.inputs(1, True), drop_unread=False)
    assert [row.tokens_out % 6 for row in wanted.blocks] == [0] * len(wanted.blocks)
    assert [r["macs"] for r in rows_of(file) if r.get("multiple_of") == 6] == [wanted.macs]
    assert "ours, keep 0.5, by 6s" in capsys.readouterr().out


@pytest.mark.parametrize("name", [pytest.param("UMT-B", marks=pytest.mark.slow), "BERT-base"])
def test_other_kinds_of_inputs(name: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    options = ["--quick", "--models", name, "--keeps", "0.7", "--methods", f"{OURS},{BASE}", "--rounds", "1"]
    assert main(["throughput", *options, "--json", str(file), "--dtypes", "bfloat16"]) == 0
    by_method = {row["method"]: row for row in rows_of(file)}
    assert by_method[OURS]["macs"] < by_method[BASE]["macs"] == by_method[COMPILED]["macs"]
    assert {row["dtype"] for row in by_method.values()} == {"bfloat16"}


def test_the_networks_are_the_ones_named() -> None:
    """Parameters in millions, as their papers or model cards have them."""
    wanted = {
        "DeiT-T": 5.7, "DeiT-S": 22.1, "DeiT-B": 86.6, "CLIP ViT-B/16": 85.8, "UMT-B": 86.5,
        "DINOv3-S": 21.6, "BEiT-B": 86.5, "BERT-base": 109.5,
    }  # fmt: skip
    with torch.device("meta"):
        found = {n.name: sum(p.numel() for p in n.make(False).parameters()) / 1e6 for n in NETWORKS.values()}
    assert found == pytest.approx(wanted, abs=1.0)
    assert NETWORKS["BERT-base"].inputs(2, False).shape == (2, 256)


def test_attention_is_not_written_out_where_its_map_does_not_fit() -> None:
    few, many = ({m.name for m in methods_of(NETWORKS["UMT-B"], batch, NAMES, [0.8], [1])} for batch in (1, 16))
    assert few == set(NAMES)
    assert few - many == {BASE, COMPILED_WRITTEN, ATTENTION}
    assert {OURS, STREAM, COMPILED} <= many


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--keeps", "0.8,1.2"), "'1.2' is no keep ratio between 0 and 1"),
        (("--batches", "0"), "'0' is not an integer of at least 1"),
        (("--models", "DeiT-X"), "'DeiT-X' is none of DeiT-T"),
    ],
)
def test_wrong_options(options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["throughput", *options])
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    options = ["costs", "--quick", "--rounds", "1", "--json", str(file)]
    assert main([*options, "--only", "merge-deit-s,capture"]) == 0
    merged, captured = rows_of(file)
    dense, both, cut = (merged["rounds_seconds"][name][0] for name in ("dense", "merged", "cut"))
    assert merged["share"]["median"] == pytest.approx((both - cut) / dense)
    assert captured["seconds"]["median"] == captured["rounds_seconds"][1] > 0
    assert f"{captured['seconds']['median']:.2f} s" in capsys.readouterr().out


def test_a_line_of_the_picture_that_is_not_full_shows_no_empty_panel() -> None:
    row = {"dtype": "float32", "batch": 1, "method": COMPILED, "macs_ratio": 1.0, "speedup": 1.0}
    rows = [row | {"model": str(i), "speedup_quartiles": (1.0, 1.0)} for i in range(5)]
    assert [axis.axison for axis in plot(rows, COMPILED).axes] == [True] * 5 + [False] * 3
