"""The checks between passes catch passes that were broken on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from graphs import aten, graph_of, leaves, only, prepared, sample
from torch import nn
from torch.fx import GraphModule, Node

from passes.graph.base import Check, CompileError, Pass, PassResult
from passes.graph.fake import describe, remember
from passes.graph.splice import ORIGIN, fake, fake_mode, splice, splice_all
from passes.graph.verify import no_stale_shapes


def network(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[0], 6, 2, 4).transpose(1, 2).relu().mean(-1)


@dataclass(frozen=True)
class Broken(Pass):
    """Changes an op and forgets what its node says of the result."""

    ensures: ClassVar[tuple[Check, ...]] = (no_stale_shapes,)

    what: str = ""

    def call(self, gm: GraphModule) -> PassResult:
        if self.what == "dimension":
            node = only(gm, aten.mean.dim)
            node.args = (node.args[0], [1], *node.args[2:])
        elif self.what == "literal":
            node = (
                only(gm, aten.view.default)
                if gm.graph.find_nodes(op="call_function", target=aten.view.default)
                else only(gm, aten.reshape.default)
            )
            sizes: Any = node.args[1]
            node.args = (node.args[0], [sizes[0], 5, *sizes[2:]])
        elif self.what == "dtype":
            node = only(gm, aten.mean.dim)
            node.kwargs = {"dtype": torch.float64}
        elif self.what == "batch":
            node = only(gm, aten.relu.default)
            node.target = aten.flatten.using_ints
            node.args = (node.args[0], 0, 1)
            node.meta["val"] = node.meta["val"].flatten(1, 2)
        return PassResult(gm)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "dimension",
            r"^after pass Broken: mean \(aten\.mean\.dim\) gives \(.+, 6, 4\), its node says \(.+, 2, 6\) "
            r"\(before Broken ran: Broken\) \[RSC-999\]$",
        ),
        ("literal", r"^after pass Broken: \w+ \(aten\.\w+\.default\) does not run: "),
        ("dtype", r"^after pass Broken: mean \(aten\.mean\.dim\) gives"),
        (
            "batch",
            r"^after pass Broken: relu \(aten\.flatten\.using_ints\) gives \(.+, 6, 4\), "
            r"its node says \(.+, 12, 4\) \(before Broken ran: Broken\) \[RSC-999\]$",
        ),
    ],
)
def test_a_stale_shape_is_caught(what: str, message: str) -> None:
    gm = graph_of(network)
    Broken()(gm)  # the graph as captured is fine
    with pytest.raises(CompileError, match=message):
        Broken(what)(gm)


def test_a_wrong_memory_hides_no_wrong_shape() -> None:
    """What passes remember of an op is not asked: memory and node agree here, and are wrong."""
    gm = graph_of(network)
    node, mode = only(gm, aten.mean.dim), fake_mode(gm.graph)
    stale = node.meta["val"]
    node.args = (node.args[0], [1], *node.args[2:])
    remember(mode, node.target, fake(node.args), fake(node.kwargs), stale)
    assert tuple(describe(mode, aten.mean.dim, fake(node.args), fake(node.kwargs)).shape) == tuple(stale.shape)
    with pytest.raises(
        CompileError, match=r"^mean \(aten\.mean\.dim\) gives \(.+, 6, 4\), its node says \(.+, 2, 6\) \[RSC-999\]$"
    ):
        no_stale_shapes(gm)


def test_the_values_of_an_op_with_several_are_compared() -> None:
    gm = graph_of(lambda x: x.split(4, dim=2)[1])
    no_stale_shapes(gm)
    node = only(gm, aten.split.Tensor)
    node.meta["val"] = [node.meta["val"][0], node.meta["val"][1][:, 1:]]
    with pytest.raises(CompileError, match=r"\(aten\.split\.Tensor\) gives \(.+, 6, 4\), its node says \(.+, 5, 4\)"):
        no_stale_shapes(gm)


def test_the_check_keeps_the_batch_symbolic() -> None:
    """Ops that torch decomposes by itself must not pin the batch to the example's."""
    gm = graph_of(lambda x: torch.nn.functional.pad(x, (1, 2)).mT.softmax(-1))
    x: Node = next(n for n in gm.graph.nodes if n.op == "placeholder")
    before = x.meta["val"].shape[0].node.expr
    no_stale_shapes(gm)
    size = x.meta["val"].shape[0]
    assert isinstance(size, torch.SymInt) and size.node.expr == before


def test_shapes_of_a_prepared_model() -> None:
    torch.manual_seed(0)
    gm = prepared(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(8)), sample())
    no_stale_shapes(gm)
    last = leaves(gm)[0]
    last.meta["val"] = last.meta["val"][:, 1:]
    with pytest.raises(CompileError):
        no_stale_shapes(gm)


def test_spliced_arithmetic_knows_where_it_comes_from() -> None:
    gm = graph_of(lambda x: x * 2)
    node = only(gm, aten.mul.Tensor)
    with gm.graph.inserting_after(node):
        total, first = splice_all(gm.graph, "score", lambda a, n: (a.sum(-1) + n, a[:, 0]), node, 5)
    assert ORIGIN.of(total) == ORIGIN.of(first) == "score"
    assert tuple(total.meta["val"].shape[1:]) == (6,) and isinstance(total.meta["val"].shape[0], torch.SymInt)
    with gm.graph.inserting_after(node), pytest.raises(ValueError, match="write constants as factory calls"):
        splice(gm.graph, "score", lambda a: a + torch.tensor([1.0, 2.0] * 4), node)


def test_a_number_read_from_a_tensor_is_the_nodes_own_symbol() -> None:
    """As many entries as the data say: what is made of that number is compared, each run's own symbol is not."""

    def read(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        many = count.max().item()
        torch._check(many >= 0)
        return x + torch.arange(many, device=x.device).sum()

    gm = graph_of(read, sample(), torch.tensor([3, 4]))
    no_stale_shapes(gm)
    only(gm, aten.arange.default).args = (5,)
    with pytest.raises(CompileError, match=r"arange \(aten\.arange\.default\) gives \(5,\), its node says \(u"):
        no_stale_shapes(gm)
