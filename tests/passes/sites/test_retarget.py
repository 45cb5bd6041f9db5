"""Behind a selection every op runs on the short sequence: sizes come from layouts, side inputs are gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from generated import Config, GeneratedViT
from graphs import C, aten, graph_of, leave_at_input, leaves, on_short_input, sample, table
from torch import Tensor
from torch.fx import Node

import rs_compile
from passes.axes.rules import Transfer, register_token_rule, registry
from passes.axes.token_axis import WAY_OUT
from passes.graph.base import Refusal
from passes.graph.codes import Code
from passes.graph.splice import ORIGIN
from passes.graph.verify import no_stale_shapes
from passes.sites.restore import RestoreTokens
from passes.sites.retarget import RetargetTokens


def mean_of_block(x: Tensor) -> Tensor:
    q = x.reshape(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(x.shape)
    return (x + y).mean(1).relu()


def test_every_twin_has_its_short_shape() -> None:
    gm = graph_of(mean_of_block)
    site = leave_at_input(gm, keep=4)
    result = RetargetTokens()(gm)
    no_stale_shapes(result.gm)
    assert site.axis is not None and result.rewrites == len(site.axis.transfers) > 5
    for node, twin in site.compact.items():
        if node in (site.full,):
            assert twin is site.short
            continue
        own, short = node.meta["val"].shape, twin.meta["val"].shape
        assert [4 if s == 6 else s for s in own] == list(short), node
        assert twin.target in (node.target, aten.reshape.default)


def test_what_stops_running_over_tokens_replaces_its_original() -> None:
    """The mean ends the axis: what follows is computed once, on the short sequence."""
    gm = graph_of(mean_of_block)
    dense = gm(sample())[0]
    leave_at_input(gm, keep=4)
    gm = RetargetTokens()(gm).gm
    assert len(gm.graph.find_nodes(op="call_function", target=aten.relu.default)) == 1
    gm = RestoreTokens()(gm).gm
    assert len(gm.graph.find_nodes(op="call_function", target=aten.mean.dim)) == 1
    assert not any(ORIGIN.get(n) == "restore" for n in gm.graph.nodes)
    assert not torch.allclose(gm(sample())[0], dense, atol=1e-3)


def test_originals_stay_for_who_needs_every_token() -> None:
    gm = graph_of(lambda x: (x.relu(), x.relu().cumsum(1), x.mean(1)))
    x = sample()
    dense = gm(x)
    site = leave_at_input(gm, keep=4)
    gm = RetargetTokens()(gm).gm
    assert site.axis is not None
    reasons = sorted(map(str, site.axis.dense.values()))
    assert reasons == ["an op along a dimension that runs over the token axis", "an output of the model"]
    found = gm(x)  # the outputs still read originals
    assert torch.equal(found[0], dense[0]) and torch.equal(found[1], dense[1])
    assert not torch.equal(found[2], dense[2])


def sizes(gm: torch.fx.GraphModule, site: Any) -> list[list[int]]:
    """Literal sizes in the twins of reshapes."""
    twins = [t for n, t in site.compact.items() if n is not site.full and t.target is aten.reshape.default]
    return [[a for a in t.args[1] if isinstance(a, int)] for t in twins]


@pytest.mark.parametrize("tokens", [8, 2, 4])  # as many as channels, as heads, as channels of a head
def test_only_the_token_axis_shrinks(tokens: int) -> None:
    gm = graph_of(lambda x: x.reshape(x.shape[0], tokens, 2, 4).transpose(1, 2) * 2, sample(tokens))
    site = leave_at_input(gm, keep=tokens - 1)
    RetargetTokens()(gm)
    assert sizes(gm, site) == [[tokens - 1, 2, 4]]


def test_a_table_is_gathered_once() -> None:
    """Two readers of one table share the gather; a table along another sequence has its own."""
    gm = graph_of(lambda x, t: (x * t, x.relu() * t, x[:, 1:] * t[1:]), tables=(table(6, C),))
    leave_at_input(gm, keep=4, prefix=1)
    before = len(gm.graph.find_nodes(op="call_function", target=aten.gather.default))
    gm = RetargetTokens()(gm).gm
    assert len(gm.graph.find_nodes(op="call_function", target=aten.gather.default)) == before + 2


def test_the_batch_size_is_read_off_the_stream() -> None:
    gm = graph_of(lambda x: (x.flatten(0, 1) * 2).reshape(x.shape[0], x.shape[1], C).mean(1))
    leave_at_input(gm, keep=4)
    gm = RetargetTokens()(gm).gm
    for batch in (1, 2, 5):
        x = sample(batch=batch)
        found = gm(x)[0]
        for b in range(batch):
            wanted = 2 * x[b][x[b].sum(-1).topk(4).indices.sort().values].mean(0)
            torch.testing.assert_close(found[b], wanted)


def mistaken(node: Node, ctx: Any) -> Transfer:
    """Says that a reshape with a literal keeps working on a short sequence."""
    return Transfer(ctx.layout(node.args[0]), target=aten.reshape.default, args=(node.args[0], [-1, 6, C]), kwargs={})


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (mistaken, "gives (2*B, 6, 8) on the short sequence, not [B, 4, 8]"),
        (
            lambda node, ctx: Transfer(ctx.layout(node.args[0]), target=aten.select.int, args=(node.args[0], 1, 5)),
            "does not run on the short sequence: ",
        ),
    ],
)
def test_a_rule_that_promises_too_much(
    rule: Callable[[Node, Any], Transfer], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rewritten op is run on fake tensors and held against the layout of its rule."""
    monkeypatch.setattr(registry, "TOKEN_RULES", dict(registry.TOKEN_RULES))
    register_token_rule(aten.relu.default, rule)
    gm = graph_of(lambda x: x.relu())
    site = leave_at_input(gm, keep=3 if "2*B" in reason else 4)
    with pytest.raises(Refusal) as refusal:
        RetargetTokens()(gm)
    found = refusal.value.reason.replace(str(site.batch.size), "B")
    assert found.startswith(reason) or "2*B" in reason
    assert refusal.value.op == "aten.relu.default" and refusal.value.way_out == WAY_OUT


def test_anchors_refuse_what_the_network_depends_on() -> None:
    gm = graph_of(lambda x: x.cumsum(1)[:, -1].mean(0) + 1)
    anchor = next(n for n in gm.graph.nodes if n.target is aten.add.Tensor)
    leave_at_input(gm, keep=4)
    with pytest.raises(Refusal) as refusal:
        RetargetTokens([anchor])(gm)
    assert refusal.value.reason == (
        "an op along a dimension that runs over the token axis, and later layers depend on it; no layer lies between"
    )
    gm = graph_of(lambda x: x.cumsum(1)[:, -1].mean(0) + 1)
    leave_at_input(gm, keep=4)
    RetargetTokens()(gm)  # only the head reads it


@torch.no_grad()
def test_values_from_before_a_prune_meet_values_from_behind_it() -> None:
    """A long skip is gathered with the kept positions."""
    x, skip = sample(), sample(seed=9)
    (value,), index = on_short_input(graph_of(lambda x, s: x * 2 + s.relu(), x, skip), x, skip)
    for b in range(3):
        torch.testing.assert_close(value[b], 2 * x[b][index[b]] + skip[b][index[b]].relu())


def test_meta_of_the_model_goes_along() -> None:
    gm = graph_of(lambda x: x.relu())
    (relu,) = leaves(gm)
    site = leave_at_input(gm, keep=4)
    RetargetTokens()(gm)
    assert site.compact[relu].meta["stack_trace"] == relu.meta["stack_trace"]


@torch.no_grad()
def test_a_gate_made_from_the_mean_is_gathered_like_a_table() -> None:
    """What runs over tokens no more, computed on the short sequence, may still have an entry per token."""
    x, weight = sample(), table(C, 6)
    gm = graph_of(lambda x, w: x * (x.mean(1) @ w)[:, :, None], tables=(weight,))
    (value,), index = on_short_input(gm, x)
    for b in range(3):
        own = x[b][index[b]]
        torch.testing.assert_close(value[b], own * (own.mean(0) @ weight)[index[b], None])


@torch.no_grad()
def test_behind_two_sites_a_table_is_gathered_once() -> None:
    """From the table itself, by positions in the first sequence: its rows, then its columns."""
    model = GeneratedViT(Config(depth=3, position_bias=True))
    fast = rs_compile.optimize(model, {0: 0.7, 1: 0.7}, backend="eager")
    fast(model.images(2))
    *_, last = fast.graph_module().graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    gathers, at = 0, last.args[3]
    while at.op != "get_attr":
        gathers += at.target is aten.gather.default
        at = at.args[0]
    assert "bias" in str(at.target) and gathers == 2


def test_a_size_that_depends_on_a_second_batch() -> None:
    """One more than the samples: what it is on the short sequence is said by no layout."""

    def network(x: Tensor) -> Tensor:
        b, n, c = x.shape
        return (x[:, :, None] * x.new_ones(b + 1, 1)).reshape(b, n, (b + 1) * c)

    gm = graph_of(network)
    leave_at_input(gm, keep=4)
    with pytest.raises(Refusal, match="a size depends on a second batch") as refusal:
        RetargetTokens()(gm)
    assert refusal.value.code == Code.DATA_DEPENDENT
