"""What each pass leaves in the debug folder, and the check behind it."""

from __future__ import annotations

import pathlib
import re
from dataclasses import dataclass

import pytest
import torch
from generated import Config, GeneratedViT
from graphs import aten, graph_of, only
from torch.fx import GraphModule

import rs_compile
from passes.graph.base import HISTORY, OBSERVER, SHOWN, Pass, PassResult, Postcondition
from passes.graph.debug import watched


@dataclass(frozen=True)
class ReluForMul(Pass):
    def call(self, gm: GraphModule) -> PassResult:
        node = only(gm, aten.mul.Tensor)
        node.target, node.args = aten.relu.default, node.args[:1]
        return PassResult(gm, rewrites=1)


@dataclass(frozen=True)
class Forgetful(Pass):
    """Cuts a token off and leaves the shape as it was."""

    def call(self, gm: GraphModule) -> PassResult:
        node = only(gm, aten.relu.default)
        node.target, node.args = aten.slice.Tensor, (node.args[0], 1, 1)
        return PassResult(gm, rewrites=1)


def test_each_pass_leaves_its_graph_and_is_checked(tmp_path: pathlib.Path) -> None:
    gm = graph_of(lambda x: x * 2 + 1)
    with watched(tmp_path / "debug") as home:
        ReluForMul()(gm)
        with pytest.raises(
            Postcondition, match=r"^after pass Forgetful: .* \(before Forgetful ran: ReluForMul\) \[RSC-"
        ):
            Forgetful()(gm)
    first, second = sorted(home.iterdir())
    assert (first.name, second.name) == ("00-ReluForMul.txt", "01-Forgetful.txt")
    assert first.read_text().startswith("ReluForMul(): 1 rewrites, 0 skips; ")
    assert "aten.relu.default" in first.read_text() and "float32[" in first.read_text()
    changed = [line for line in second.read_text().splitlines() if line.startswith(("-", "+")) and line[1] not in "-+"]
    assert any(line[0] == "-" and "aten.relu" in line for line in changed)
    assert any(line[0] == "+" and "aten.slice" in line for line in changed)
    with watched(tmp_path / "debug") as again:
        assert again != home
    before = len(list(home.iterdir()))
    ReluForMul()(graph_of(lambda x: x * 2))
    assert len(list(home.iterdir())) == before  # closed
    assert HISTORY.of(gm) == ("ReluForMul",)


def test_who_observed_before_still_does_and_what_is_shown_survives(tmp_path: pathlib.Path) -> None:
    seen: list[str] = []
    token = OBSERVER.set(lambda pass_, _: seen.append(pass_.name))
    gm = graph_of(lambda x: (x + 3, x * 2)[1])
    SHOWN.put(only(gm, aten.mul.Tensor).prev, True)
    try:
        with watched(tmp_path):
            ReluForMul()(gm)
    finally:
        OBSERVER.reset(token)
    assert seen == ["ReluForMul"] and only(gm, aten.add.Tensor).users == {}


def test_optimize_leaves_them_where_it_is_told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GeneratedViT(Config(depth=2, width=16)).eval()
    x = model.images(2)
    with torch.no_grad():
        rs_compile.optimize(model, {0: 0.5}, backend="eager", debug=tmp_path / "a")(x)
    names = [p.name.split("-")[1] for p in sorted((tmp_path / "a" / "1").iterdir())]
    assert names[0] == "InlineRegions.txt" and "InsertSelection.txt" in names and "RestoreTokens.txt" in names
    (retargeted,) = (tmp_path / "a" / "1").glob("*-RetargetTokens.txt")
    assert re.search(r"# float32\[\w+, 13, 16\]  \[batch, tokens\(13\), 16\]", retargeted.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RS_COMPILE_DEBUG", "1")
    with torch.no_grad():
        rs_compile.optimize(model, {0: 0.5}, backend="eager")(x)
    assert len(list((tmp_path / "rs_compile_debug" / "1").iterdir())) == len(names)
