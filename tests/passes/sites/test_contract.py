"""Passes that take tokens out hold each other to what they say: graphs that were broken between them on purpose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import aten, graph_of, leave_at_input, only
from torch.fx import GraphModule

from passes.axes.rules.full_length import FullLength
from passes.cleanup.composites import WriteComposites, no_composite
from passes.graph.base import CompileError, Precondition
from passes.sites.contract import no_open_site, open_site, put_back_nowhere, retargeted
from passes.sites.explicit_attention import ExplicitAttention, no_attention_op
from passes.sites.full_length import WriteFullLength, no_full_length_op
from passes.sites.insert import InsertSelection
from passes.sites.insert_merge import InsertMerge
from passes.sites.insert_ward import InsertWard
from passes.sites.restore import RestoreTokens
from passes.sites.retarget import RetargetTokens
from passes.sites.site import SITE, Site
from passes.sites.sizes import MEAN_SIZES, ApplySizes, no_noted_size


def opened() -> tuple[GraphModule, Site]:
    gm = graph_of(lambda x: (x * 2).relu())
    return gm, leave_at_input(gm, keep=4)


def test_passes_in_order() -> None:
    gm, site = opened()
    open_site(gm)
    with pytest.raises(CompileError, match="an earlier selection was not retargeted and restored"):
        no_open_site(gm)
    gm = RestoreTokens().apply(RetargetTokens().apply(gm).gm).gm
    assert SITE.take(gm) is site
    no_open_site(gm)
    assert all(
        no_open_site in p.requires and open_site in p.ensures for p in (InsertSelection, InsertMerge, InsertWard)
    )


def test_passes_out_of_order_are_named() -> None:
    with pytest.raises(Precondition, match=r"^before pass RetargetTokens: no selection or merge stands open \(before"):
        RetargetTokens().apply(graph_of(lambda x: x * 2))
    with pytest.raises(Precondition, match=r"^before pass RestoreTokens: the selection was not retargeted \(before"):
        RestoreTokens().apply(opened()[0])


def cut(site: Site) -> None:
    site.short.meta["val"] = site.short.meta["val"][:, 1:]


def as_half(site: Site) -> None:
    site.full.meta["val"] = site.full.meta["val"].half()


def no_index(site: Site) -> None:
    site.index.meta["val"] = site.index.meta["val"].float()


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (cut, "has not the tokens that .* names"),
        (as_half, "is not what it stands for"),
        (no_index, r"holds no positions \[B, K\]"),
    ],
)
def test_a_site_that_does_not_fit_together(spoil: Callable[[Site], None], text: str) -> None:
    gm, site = opened()
    spoil(site)
    with pytest.raises(Precondition, match=f"^before pass RetargetTokens: .*{text}"):
        RetargetTokens().apply(gm)


def test_what_is_left_half_done_is_named_with_its_pass() -> None:
    gm, site = opened()
    gm = RetargetTokens().apply(gm).gm
    retargeted(gm)
    assert site.axis is not None
    del site.compact[next(iter(site.axis.transfers))]
    with pytest.raises(CompileError, match="runs over tokens and has no compact form"):
        retargeted(gm)


def test_checks_of_other_passes() -> None:
    gm = graph_of(lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x))
    with pytest.raises(CompileError, match="an attention is not written out"):
        no_attention_op(gm)
    no_composite(gm)
    gm = graph_of(lambda x: x.mean(1))
    mean = only(gm, aten.mean.dim)
    MEAN_SIZES.put(mean, (mean, 0, 1))
    with pytest.raises(CompileError, match="sizes of merged tokens are noted and not written"):
        no_noted_size(gm)
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(FullLength.__new__(FullLength), ())
    with pytest.raises(CompileError, match="a product that runs on every token's place is not written out"):
        no_full_length_op(gm)
    checks = {check for p in (ApplySizes, WriteFullLength, ExplicitAttention, WriteComposites) for check in p.ensures}
    assert checks == {no_noted_size, no_full_length_op, no_attention_op, no_composite}


def test_a_selection_that_is_put_back_at_once() -> None:
    gm = graph_of(lambda x: x * 2)
    site = leave_at_input(gm, keep=4)
    with pytest.raises(CompileError, match=r"puts pruned tokens back at once, and is still read by mul\w* \[RSC-999"):
        put_back_nowhere(gm)
    site.full.replace_all_uses_with(site.stream)
    gm.graph.eliminate_dead_code()
    put_back_nowhere(gm)
