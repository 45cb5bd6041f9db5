"""The support matrix is what its data say, and the data are what the models do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.support.command import cell, page
from bench.support.doing import COLUMNS, Idle, Wrong, outcome, tried
from bench.support.families import families
from passes.graph.base import CompileError
from passes.graph.codes import Code

ROOT = Path(__file__).parents[1]
DATA = json.loads((ROOT / "bench" / "results" / "support.json").read_text())


def test_the_page_is_what_the_data_say() -> None:
    assert [row["family"] for row in DATA["rows"]] == [family.name for family in families()]
    assert (ROOT / "docs" / "support.md").read_text() == page(DATA["rows"], DATA["environment"])


def test_nothing_is_wrong() -> None:
    cells = {(row["family"], column): row[column] for row in DATA["rows"] for column in COLUMNS}
    assert len(cells) == 7 * len(families())
    assert [where for where, found in cells.items() if found["result"] not in ("yes", "no", "refused")] == []
    assert all(found["code"] in list(Code) for found in cells.values() if found["result"] == "refused")


@pytest.mark.parametrize(
    "family, column",
    [
        *(("DeiT, ViT", "prune"), ("DeiT, ViT", "train"), ("ResNet", "merge"), ("Vision Mamba", "merge")),
        # a mask that transformers makes for the export alone must not keep flash away
        pytest.param("DINOv2", "gpu", marks=pytest.mark.inductor),
        pytest.param("BEiT", "gpu", marks=[pytest.mark.inductor, pytest.mark.slow]),
    ],
)
def test_live(family: str, column: str) -> None:
    if column == "gpu":
        pytest.importorskip("triton", reason="torch's builds for CPUs come without it")
    row: dict[str, Any] = next(row for row in DATA["rows"] if row["family"] == family)
    model = tried(next(f for f in families() if f.name == family))
    assert outcome(getattr(model, column)) == row[column]


def test_outcomes() -> None:
    def raises(error: Exception) -> str:
        raise error

    assert outcome(lambda: "every block") == {"result": "yes", "note": "every block"}
    refused = outcome(lambda: raises(CompileError("no\n  way out: other", code=Code.EVERY_TOKEN)))
    assert refused == {"result": "refused", "code": "RSC-403", "note": "no"}
    assert cell(refused) == "[RSC-403](troubleshooting.md#rsc-403)"
    assert cell(outcome(lambda: raises(Idle("saves nothing")))) == "no: saves nothing"
    assert cell(outcome(lambda: "no attention"), "lowers") == "lowers: no attention"
    assert outcome(lambda: raises(Wrong("shapes"))) == {"result": "WRONG", "note": "shapes"}
    assert outcome(lambda: raises(KeyError("x"))) == {"result": "FAULT", "note": "KeyError: 'x'"}


def test_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["support", "--only", "nosuch"]) == 2
    assert "--only nosuch: write some of DeiT, ViT; DINOv2" in capsys.readouterr().err
