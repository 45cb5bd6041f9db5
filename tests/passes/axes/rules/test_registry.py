"""The table of rules: ops that a user registers, and rules that are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graphs import aten, axis_from_input, graph_of, leaves, on_short_input, refusals, rows, sample

from passes.axes.rules import Context, Transfer, register_token_rule, registry
from passes.graph.layout import Dim

NO_RULE = "no rule says what this op does to a shorter sequence of tokens"


def test_reading_the_number_of_tokens() -> None:
    """A literal in every captured graph; a rule asked for it all the same says no."""
    gm = graph_of(lambda x: x * 2)
    axis = axis_from_input(gm)
    (leaf,) = leaves(gm)
    context = Context(axis.layouts, axis.batch)
    with gm.graph.inserting_after(leaf):
        tokens, samples = (gm.graph.call_function(aten.sym_size.int, (leaf, d)) for d in (1, 0))
    rule = registry.rule_for(aten.sym_size.int)
    assert rule is not None and rule(samples, context).out is None
    with pytest.raises(registry.Untransferable, match=r"^reads the number of tokens as a value \[RSC-403\]$"):
        rule(tokens, context)


@pytest.fixture(scope="module")
def custom() -> Iterator[Any]:
    """An op that torch knows nothing about: the running sum over tokens."""
    with torch.library._scoped_library("rs_rules", "DEF") as library:
        library.define("scan(Tensor x) -> Tensor")
        library.impl("scan", lambda x: x.cumsum(1), "CompositeExplicitAutograd")
        library.impl("scan", lambda x: torch.empty_like(x), "Meta")
        yield torch.ops.rs_rules.scan


def keep_layout(node: Any, ctx: Context) -> Transfer:
    layout = ctx.layout(node.args[0])
    assert layout is not None
    return Transfer(layout, mixes=True)


def other_layout(node: Any, ctx: Context) -> Transfer:
    layout = ctx.layout(node.args[0])
    assert layout is not None
    return Transfer(layout[::-1])


def broken(node: Any, ctx: Context) -> Transfer:
    return Transfer(node.kwargs["absent"])


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (None, NO_RULE),
        (keep_layout, None),
        (other_layout, "the layout [8, tokens(6), batch] does not explain the shape (B, 6, 8)"),
    ],
)
def test_custom_op(
    custom: Any, rule: registry.Rule | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "TOKEN_RULES", dict(registry.TOKEN_RULES))
    if rule is not None:
        register_token_rule(custom.default, rule)
    x = sample()
    gm = graph_of(lambda x: custom(x))
    axis = axis_from_input(gm)
    assert refusals(axis) == ([] if reason is None else [reason])
    if reason is None:
        (value,), index = on_short_input(gm, x, keep=4)
        torch.testing.assert_close(value, rows(x, index).cumsum(1))


def test_a_rule_that_fails_warns_and_names_the_op(custom: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TOKEN_RULES", dict(registry.TOKEN_RULES))
    register_token_rule(custom.default, broken)
    gm = graph_of(lambda x: custom(x))
    with pytest.warns(RuntimeWarning, match=r"^rs_compile: rs_rules.scan.default: its rule failed .* please report"):
        axis = axis_from_input(gm)
    assert refusals(axis) == ["its rule failed on this form of rs_rules.scan.default (KeyError: 'absent')"]


def test_a_rule_may_stand_for_all_overloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TOKEN_RULES", dict(registry.TOKEN_RULES))
    register_token_rule(aten.sort, lambda node, ctx: Transfer(None))
    assert registry.rule_for(aten.sort.default) is registry.rule_for(aten.sort.stable)
    with pytest.raises(TypeError, match=r"^'sort' is no op; pass torch\.ops\.<namespace>\.<name> or what "):
        register_token_rule("sort", keep_layout)
    with pytest.raises(TypeError, match=r"^<built-in method cumsum .* is no op; pass"):
        register_token_rule(torch.cumsum, keep_layout)  # a rule that no node would ask for


def test_a_rule_for_what_custom_op_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TOKEN_RULES", dict(registry.TOKEN_RULES))

    @torch.library.custom_op("rs_rules::running_sum", mutates_args=())
    def running_sum(x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1)

    running_sum.register_fake(torch.empty_like)
    register_token_rule(running_sum, keep_layout)
    x = sample()
    gm = graph_of(lambda x: running_sum(x))
    assert refusals(axis_from_input(gm)) == []
    (value,), index = on_short_input(gm, x, keep=4)
    torch.testing.assert_close(value, rows(x, index).cumsum(1))


def test_inplace_pointwise_has_no_rule() -> None:
    assert registry.rule_for(aten.relu.default) is not None
    assert registry.rule_for(aten.relu_.default) is None


def test_plain_dimensions() -> None:
    axis = axis_from_input(graph_of(lambda x: x * 2))
    context = Context(axis.layouts, axis.batch)
    samples: Dim = (axis.batch,)
    assert context.plain(axis.batch.size) == samples and len(context.plain(6)) == 1 and context.plain(1) == ()
    assert context.layout("no node") is None
