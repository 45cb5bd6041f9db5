"""The count against the digits that papers print, against fvcore, and against counting one by one."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.export import Dim, export
from torch.fx import Graph, GraphModule, Node

from passes.graph.base import CompileError
from passes.graph.cost import Cost, Count, count, register_cost
from passes.graph.cost_rules import RULES

aten = torch.ops.aten


def captured(model: nn.Module, *args: Tensor, batch: Any = Dim.AUTO) -> GraphModule:
    shapes = tuple({0: batch} for _ in args)
    gm = export(model, args, dynamic_shapes=shapes, strict=False).module(check_guards=False)
    assert isinstance(gm, GraphModule)
    return gm


def on_meta(name: str, **options: Any) -> GraphModule:
    with torch.device("meta"):
        return captured(timm.create_model(name, **options).eval(), torch.empty(2, 3, 224, 224))


@pytest.mark.parametrize(
    ("name", "gflops"),
    [
        ("deit_tiny_patch16_224", 1.258),
        ("deit_small_patch16_224", 4.608),
        ("deit_base_patch16_224", 17.583),
        ("resnet34", 3.671),
        ("resnet50", 4.112),
    ],
)
def test_printed_gflops(name: str, gflops: float) -> None:
    cost = count(on_meta(name))
    assert round(cost.flops / 1e9, 3) == gflops
    assert cost.uncounted == ()


class Pruned(nn.Module):
    """DeiT with the token counts of the paper; which tokens go does not matter to the count."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit: Any = vit

    def forward(self, x: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(x))
        for i, block in enumerate(self.vit.blocks):
            x = block(x)[:, : {0: 158, 3: 127, 6: 102}.get(i, 197)]
        return self.vit.forward_head(self.vit.norm(x))


@pytest.mark.parametrize(("size", "gflops"), [("tiny", 0.805), ("small", 2.993), ("base", 11.513)])
def test_printed_gflops_of_the_pruned_models(size: str, gflops: float) -> None:
    with torch.device("meta"):
        model = Pruned(timm.create_model(f"deit_{size}_patch16_224").eval())
        cost = count(captured(model, torch.empty(2, 3, 224, 224)))
    assert round(cost.flops / 1e9, 3) == gflops


class Mixed(nn.Module):
    """What fvcore supports beside a ViT: grouped and transposed convolution, norms, einsum, bmm, resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True), nn.BatchNorm2d(6)])
        self.plain = nn.BatchNorm2d(6, affine=False)
        self.bare = nn.LayerNorm(6, elementwise_affine=False)
        self.pool = nn.AdaptiveAvgPool2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.conv(x))
        for norm in self.norms:
            x = norm(x)
        x = nn.functional.interpolate(self.plain(x), scale_factor=2, mode="bilinear")
        x = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
        tokens = self.bare(self.pool(x).flatten(2).transpose(1, 2))  # [B, 9, 6]
        y = torch.einsum("abc,adc->abd", tokens, tokens)
        y = torch.bmm(y, tokens) + torch.einsum("bnc,cd->bnd", tokens, tokens[0, :6])
        return y @ tokens.transpose(1, 2)


@pytest.mark.parametrize("name", ["vit", "resnet18", "convnext_atto", "mixed", "mixed, training"])
def test_agrees_with_fvcore(name: str) -> None:
    model: nn.Module
    if name == "vit":
        model = timm.create_model("deit_tiny_distilled_patch16_224", depth=2, img_size=64)
    else:
        model = Mixed() if name.startswith("mixed") else timm.create_model(name)
    model.train(name.endswith("training"))
    no: Any = False
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = no  # fvcore counts an SDPA as 0
    x = torch.randn(1, 4 if name.startswith("mixed") else 3, 64, 64)
    theirs = FlopCountAnalysis(model, x).unsupported_ops_warnings(False)
    ours = count(captured(model, x, batch=Dim.STATIC))
    assert ours.flops == theirs.total()
    assert ours.uncounted == ()


def test_a_fused_attention_costs_what_the_handwritten_one_does() -> None:
    fused = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    by_hand = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    attention: Any = by_hand.get_submodule("blocks.0.attn")
    attention.fused_attn = False
    x = torch.randn(2, 3, 224, 224)
    assert count(captured(fused, x)).flops == count(captured(by_hand, x)).flops


def test_counts_one_sample_whatever_the_batch() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    one = count(captured(model, torch.randn(1, 3, 224, 224), batch=Dim.STATIC))
    symbolic = count(captured(model, torch.randn(5, 3, 224, 224)))
    literal = count(captured(model, torch.randn(5, 3, 224, 224), batch=Dim.STATIC))
    assert symbolic.flops == one.flops == literal.flops // 5


def test_samples_taken_in_groups() -> None:
    class Frames(nn.Module):
        """A linear layer on every frame, and one on the mean of each clip of four."""

        def __init__(self) -> None:
            super().__init__()
            self.each, self.clip = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.clip(self.each(x).view(x.shape[0] // 4, 4, 8).mean(1))

    cost = count(captured(Frames(), torch.randn(12, 6)))
    assert cost.macs == 6 * 8 + 8 * 5 // 4


def test_blocks_sum_to_the_whole() -> None:
    gm = on_meta("vit_tiny_patch16_224", depth=2)
    cost, nodes = count(gm), list(gm.graph.nodes)
    assert cost.between(nodes) == Count(cost.macs, cost.flops - cost.macs)
    assert cost.between(nodes[:40]) + cost.between(nodes[40:]) == cost.between(nodes)
    assert cost.between([nodes[0], nodes[0]]) == Count()
    norm = next(node for node in nodes if node.target is aten.layer_norm.default)
    assert cost.by_node[norm] == Count(macs=0, other=5 * 197 * 192)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.linear(x)
        with torch.no_grad():
            return torch.cumsum(x @ x.transpose(1, 2), 1)


def test_enters_the_subgraphs_of_higher_order_ops() -> None:
    gm = captured(Nested(), torch.randn(3, 5, 4))
    names = {str(node.target) for node in gm.graph.nodes}
    assert {"wrap_with_autocast", "wrap_with_set_grad_enabled"} <= names
    cost = count(gm)
    assert cost.macs == 5 * 4 * 4 + 5 * 5 * 4
    assert cost.between(gm.graph.nodes).macs == cost.macs
    assert cost.uncounted == ()


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x @ x.transpose(1, 2) @ x, lambda x: x + 1, (x,))


def test_of_two_branches_the_dearer_counts() -> None:
    assert count(captured(Branching(), torch.randn(3, 5, 4))).macs == 2 * 5 * 5 * 4


def test_a_graph_module_that_is_called_is_entered() -> None:
    inner = captured(nn.Linear(4, 6), torch.randn(3, 5, 4))
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(1, 5, 4, device="meta")
    graph.output(graph.call_module("inner", (x,)))
    symbol = next(iter(inner.graph.find_nodes(op="placeholder"))).meta["val"]
    x.meta["val"] = symbol
    assert count(GraphModule({"inner": inner}, graph)).macs == 5 * 4 * 6


@pytest.fixture
def custom_op() -> Iterator[Any]:
    @torch.library.custom_op("cost_test::scan", mutates_args=())
    def scan(x: Tensor, states: int) -> Tensor:
        return x.clone()

    @scan.register_fake
    def _(x: Tensor, states: int) -> Tensor:
        return torch.empty_like(x)

    before = dict(RULES)
    yield scan
    RULES.clear()
    RULES.update(before)


def test_a_custom_op_is_named_until_it_registers_its_cost(custom_op: Any) -> None:
    class Scan(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return custom_op(x, 16)

    gm = captured(Scan(), torch.randn(3, 5, 4))
    cost = count(gm)
    assert cost.flops == 0
    (skip,) = cost.uncounted
    assert skip.reason == "cost_test.scan.default counts as 0: no rule counts it"
    assert "give it one with rs_compile.register_cost" in skip.way_out
    assert "custom_op(x, 16)" in skip.where

    for op in (torch.ops.cost_test.scan.default, torch.ops.cost_test.scan, custom_op):
        register_cost(op, lambda out, x, states: 4 * prod(x) * states)
        assert count(gm) == Cost({node: Count(4 * 5 * 4 * 16) for node in cost_nodes(gm)})
    register_cost(torch.ops.cost_test.scan.default, lambda out, x, states: Count(macs=1, other=2))
    assert (count(gm).macs, count(gm).flops) == (1, 3)


def cost_nodes(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if "cost_test" in str(node.target)]


def test_register_refuses_what_is_no_operator() -> None:
    with pytest.raises(TypeError, match=r"^'aten.mm' is no op; pass torch\.ops\.<namespace>\.<name> or what "):
        register_cost("aten.mm", lambda *_: 0)


def test_an_op_that_hides_products_is_named() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x)[0].relu()

    (skip,) = count(captured(Recurrent(), torch.randn(3, 5, 4), batch=Dim.STATIC)).uncounted
    assert skip.reason.startswith("aten.gru.input counts as 0: no rule counts it")


def test_a_size_that_depends_on_the_data_is_named() -> None:
    class Ragged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x[0, :, 0].nonzero().to(x.dtype)
            return y @ y.transpose(0, 1)

    (skip,) = count(captured(Ragged(), torch.randn(3, 5, 4))).uncounted
    assert skip.reason.startswith("aten.matmul.default counts as 0: its size u")
    assert skip.reason.endswith(" is not the batch's")


def test_a_node_without_its_value_is_refused() -> None:
    gm = captured(nn.Linear(4, 4), torch.randn(3, 5, 4))
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    del linear.meta["val"]
    message = (
        "^cannot count: linear carries no fake value; capture the model again, "
        r'or give the nodes that a pass inserts their meta\["val"\] \[RSC-999\]$'
    )
    with pytest.raises(CompileError, match=message):
        count(gm)


def test_a_parameter_is_read_where_its_value_is_missing() -> None:
    gm = captured(nn.Linear(4, 6), torch.randn(3, 5, 4))
    for node in gm.graph.find_nodes(op="get_attr"):
        del node.meta["val"]
    assert count(gm).macs == 5 * 4 * 6
