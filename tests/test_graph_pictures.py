"""The pictures of graphs: drawn from what the passes leave, and those in the documentation are these."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.__main__ import main
from bench.graphs.drawing import svg
from bench.graphs.recorded import Row

IMG = Path(__file__).parents[1] / "docs" / "img"
PAGE = (IMG.parent / "how-it-works.md").read_text()
README = (IMG.parents[1] / "README.md").read_text()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("img")
    assert main(["graphs", "--out", str(folder)]) == 0
    return {path.name: path.read_text() for path in folder.iterdir()}


def words(picture: str) -> list[str]:
    root = ElementTree.fromstring(picture)
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_committed_ones_are_those(drawn: dict[str, str]) -> None:
    assert set(drawn) == {path.name for path in IMG.glob("*.svg")}
    shown = re.findall(r"\(img/(\S+\.svg)\)", PAGE) + re.findall(r"\(docs/img/(\S+\.svg)\)", README)
    assert set(shown) == set(drawn)
    stale = [name for name, picture in drawn.items() if words(picture) != words((IMG / name).read_text())]
    assert stale == [], "draw them again: python -m bench graphs"


def test_what_they_show(drawn: dict[str, str]) -> None:
    of = {name.removeprefix("graph-").removesuffix(".svg"): words(picture) for name, picture in drawn.items()}
    assert "softmax[B, 2, 17, 17]" in of["attention-captured"] and "softmax" not in "".join(of["attention-lowered"])
    assert "SDPA[B, 2, 17, 20]" in of["attention-lowered"]
    assert [w for w in of["block"] if w.endswith(" branch")] == [
        f"block {i}: {kind} branch" for i in (0, 1) for kind in ("attention", "MLP")
    ]
    names = [w for w in of["inserted"] if w in ("score", "select", "gather", "put back")]
    assert names == ["score", "select", "gather", "put back"] and "topk[B, 12]" in of["inserted"]
    assert {"SDPA[B, 2, 17, 20]", "SDPA[B, 2, 12, 20]"} <= set(of["retargeted"])
    assert "put back" not in of["compact"] and "put back" in of["restored"]
    assert "linear[B, 12, 160]" in of["read"] and "linear[B, 1, 160]" in of["unread"]
    assert {"merge", "put back"} <= set(of["merged"])


def test_the_one_of_the_readme(drawn: dict[str, str]) -> None:
    """Narrow, so that letters stay legible on a phone; what the text beside it names is in it."""
    root = ElementTree.fromstring(drawn["before-after.svg"])
    assert int(root.attrib["width"]) <= 420
    told = [
        w for w in words(drawn["before-after.svg"]) if w not in ("before", "after", "block i", "block i + 1", "MLP")
    ]
    assert told == [
        *("attention", "all N tokens go on", "attention", "N tokens, everywhere"),
        *("attention", "score ‖MLP(x) − x‖", "top-k", "gather", "flash attention", "K < N tokens from here on"),
    ]


def test_lanes_and_colours() -> None:
    """A stream and a branch beside it: the sum goes on in the stream's lane."""
    rows = [
        Row("add", "[B, 4, 2]", (), "", (4, 2)),
        Row("linear", "[B, 4, 2]", (0,), "MLP", (4, 2)),
        Row("add <&>", "[B, 4, 2]", (0, 1), "", (4, 2)),
        Row("select", "[B, 2]", (2,), "", (2,)),
    ]
    picture = svg("a title", rows, {"all": 4}, {"all": "all 4", "none": "none"})
    root = ElementTree.fromstring(picture)
    dots = root.findall("{http://www.w3.org/2000/svg}circle")[2:]
    assert [(dot.get("cx"), dot.get("class")) for dot in dots] == [
        ("16", "all"), ("32", "all"), ("16", "all"), ("16", "none")
    ]  # fmt: skip
    edges = root.findall("{http://www.w3.org/2000/svg}path")
    assert len(edges) == 4 and "add <&>[B, 4, 2]" in words(picture)
