"""The contract around a pass: checks before and after, clean-up, and errors that say which pass it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from graphs import aten, graph_of, only
from torch.fx import GraphModule

from passes.graph.base import (
    Check,
    CompileError,
    Pass,
    PassResult,
    Postcondition,
    Precondition,
    Refusal,
    Skip,
    finish,
    op_name,
    source_line,
)
from passes.graph.codes import Code
from passes.graph.splice import splice


def doubles(gm: GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor))


def has_a_mul(gm: GraphModule) -> None:
    if not doubles(gm):
        raise CompileError("no mul is left")


@dataclass(frozen=True)
class ReluForMul(Pass):
    """Replaces every mul by a relu, and leaves the mul for dead-code removal."""

    def call(self, gm: GraphModule) -> PassResult:
        found = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
        for node in found:
            with gm.graph.inserting_after(node):
                relu = gm.graph.call_function(aten.relu.default, (node.args[0],))
            relu.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(relu)
        return PassResult(gm, rewrites=len(found))


@dataclass(frozen=True)
class NeedsMul(ReluForMul):
    requires: ClassVar[tuple[Check, ...]] = (has_a_mul,)


@dataclass(frozen=True)
class PromisesMul(ReluForMul):
    ensures: ClassVar[tuple[Check, ...]] = (has_a_mul,)


@dataclass(frozen=True)
class LeavesTheRest(ReluForMul):
    leaves_dead_code: ClassVar[bool] = True


@dataclass(frozen=True)
class NewGraph(Pass):
    """Returns another graph module."""

    ensures: ClassVar[tuple[Check, ...]] = (has_a_mul,)

    def call(self, gm: GraphModule) -> PassResult:
        return PassResult(graph_of(lambda x: x * 3))


@dataclass(frozen=True)
class Misorders(Pass):
    """Lets an op read a value that is computed after it."""

    def call(self, gm: GraphModule) -> PassResult:
        first, last = only(gm, aten.mul.Tensor), only(gm, aten.relu.default)
        first.args = (last, 2)
        return PassResult(gm)


@dataclass(frozen=True)
class Forgets(Pass):
    """Puts in an op and does not say what it gives."""

    def call(self, gm: GraphModule) -> PassResult:
        node = only(gm, aten.mul.Tensor)
        del node.meta["val"]
        return PassResult(gm)


@dataclass(frozen=True)
class Shortens(Pass):
    """Gives another output, and may say so."""

    said: bool = False

    @property
    def changes_outputs(self) -> bool:
        return self.said

    def call(self, gm: GraphModule) -> PassResult:
        output = gm.graph.output_node()
        (node,) = output.all_input_nodes
        with gm.graph.inserting_before(output):
            output.args = ((splice(gm.graph, "", lambda x: x[:, :2], node),),)
        return PassResult(gm)


@dataclass(frozen=True)
class RefusesTheModel(ReluForMul):
    """What it ensures asks of the model, which refuses."""

    @staticmethod
    def by_data(gm: GraphModule) -> None:
        raise Refusal("depends on the data", code=Code.DATA_DEPENDENT)

    ensures: ClassVar[tuple[Check, ...]] = (by_data,)


@dataclass(frozen=True)
class Refuses(Pass):
    def call(self, gm: GraphModule) -> PassResult:
        raise Refusal("this is not proven", only(gm, aten.mul.Tensor), "do something else")


def test_clean_up_and_recompile() -> None:
    gm = graph_of(lambda x: x * 2)
    result = ReluForMul()(gm)
    assert result.rewrites == 1 and result.skips == () and doubles(gm) == 0
    x = torch.tensor([[[-1.0] * 8] * 6])
    assert torch.equal(result.gm(x)[0], x * 0)
    assert ReluForMul()(gm).rewrites == 0


def test_dead_code_may_be_left_for_the_next_pass() -> None:
    gm = graph_of(lambda x: x * 2)
    assert doubles(LeavesTheRest()(gm).gm) == 1
    assert doubles(ReluForMul()(gm).gm) == 0


def test_every_pass_ensures_values_and_outputs() -> None:
    with pytest.raises(Postcondition, match=r"^after pass Forgets: mul \(aten.mul.Tensor\) has no fake value"):
        Forgets()(graph_of(lambda x: x * 2))
    gm = graph_of(lambda x: x * 2)
    with pytest.raises(Postcondition, match=r"^after pass Shortens: the outputs are .+, 2, 8.+, and were .+, 6, 8"):
        Shortens()(gm)
    assert Shortens(said=True)(graph_of(lambda x: x * 2)).gm(torch.ones(1, 6, 8))[0].shape == (1, 2, 8)


def test_what_the_model_refuses_is_no_fault_of_a_pass() -> None:
    with pytest.raises(Refusal, match=r"^depends on the data \[RSC-203\]$"):
        RefusesTheModel()(graph_of(lambda x: x * 2))


def test_what_must_hold_at_the_end_names_the_passes_that_ran() -> None:
    gm = ReluForMul()(graph_of(lambda x: x * 2)).gm
    finish(gm)
    with pytest.raises(Postcondition, match=r"^after all passes: no mul is left \(before this check ran: ReluForMul\)"):
        finish(gm, has_a_mul)


def test_each_pass_has_a_logger(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "passes.ReluForMul"):
        ReluForMul()(graph_of(lambda x: x * 2))
    assert ("passes.ReluForMul", "1 rewrites, 0 skips") in [(r.name, r.getMessage()) for r in caplog.records]


def test_writes_and_random_numbers() -> None:
    """A random op that nothing reads goes, an op that writes stays."""
    gm = graph_of(lambda x: (x.relu(), torch.rand_like(x), x.clone().mul_(2))[0])
    ReluForMul()(gm)
    assert not gm.graph.find_nodes(op="call_function", target=aten.rand_like.default)
    assert gm.graph.find_nodes(op="call_function", target=aten.mul_.Tensor)


def test_requires_is_checked_on_the_input() -> None:
    gm = graph_of(lambda x: x + 1)
    with pytest.raises(
        Precondition, match=r"^before pass NeedsMul: no mul is left \(before NeedsMul ran: none\) \[RSC-"
    ):
        NeedsMul()(gm)
    NeedsMul()(graph_of(lambda x: x * 2))


def test_ensures_is_checked_on_the_result() -> None:
    with pytest.raises(
        Postcondition, match=r"^after pass PromisesMul: no mul is left \(before P\w+ ran: none\) \[RSC-"
    ):
        PromisesMul()(graph_of(lambda x: x * 2))
    assert doubles(NewGraph()(graph_of(lambda x: x + 1)).gm) == 1  # the input has none, the result has


def test_a_malformed_graph_is_laid_at_the_passs_door() -> None:
    with pytest.raises(CompileError, match=r"^pass Misorders left a malformed graph: ") as error:
        Misorders()(graph_of(lambda x: (x * 2).relu()))
    assert "used before it has been defined" in str(error.value)


def test_a_refusal_comes_through_as_it_is() -> None:
    with pytest.raises(Refusal, match="this is not proven"):
        Refuses()(graph_of(lambda x: x * 2))


class Doubles(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_refusal_text() -> None:
    gm = graph_of(Doubles())
    node = only(gm, aten.mul.Tensor)
    refusal = Refusal("this is not proven", node, "do something else", code=Code.FORM)
    line = Doubles.forward.__code__.co_firstlineno + 1
    where = f'File "{__file__}", line {line}, in forward: return x * 2'
    assert str(refusal) == (
        f"aten.mul.Tensor (mul): this is not proven [RSC-408]\n  in the model: {where}\n  way out: do something else"
    )
    assert (refusal.reason, refusal.op, refusal.node_name) == ("this is not proven", "aten.mul.Tensor", "mul")
    assert (refusal.where, refusal.way_out) == (where, "do something else")
    assert str(Refusal("no node")) == "no node [RSC-999]"
    assert str(Refusal("no node", way_out="leave")) == "no node [RSC-999]\n  way out: leave"
    del node.meta["stack_trace"]
    assert str(Refusal("no line", node)) == "aten.mul.Tensor (mul): no line [RSC-999]"


def test_lines_of_layers_are_the_models_lines() -> None:
    """The line that calls a layer, not the body of torch's own layer."""
    linear = torch.nn.Linear(8, 8).requires_grad_(False)
    gm = graph_of(lambda x: linear(x))
    assert "/torch/nn/" not in source_line(only(gm, aten.linear.default))


def test_skip() -> None:
    node = only(graph_of(Doubles()), aten.mul.Tensor)
    assert Skip.at(node, "why") == Skip("mul", "why", source_line(node))
    assert "return x * 2" in Skip.at(node, "why").where
    assert op_name(node) == "aten.mul.Tensor"
    assert op_name(next(iter(node.graph.nodes))).startswith("placeholder ")
    assert op_name(node.graph.call_function(graph_of, ())) == "graph_of"  # its text would hold an address


def test_a_pass_is_named_for_its_class() -> None:
    assert NeedsMul().name == "NeedsMul"
    assert NeedsMul() == NeedsMul()
    abstract: Any = Pass
    with pytest.raises(TypeError, match="abstract"):
        abstract()
