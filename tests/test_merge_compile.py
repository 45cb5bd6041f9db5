"""Matching and merging under torch.compile: one graph, no breaks, the same ops whatever merges."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from schedules import merger_of
from torch import Tensor, nn
from torch.fx import GraphModule

from rs_compile import Schedule, optimize


def small(side: int = 48) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", img_size=side, depth=3, embed_dim=48, num_heads=3).eval()


@pytest.mark.parametrize("merger", ["stream", "tome", "vid-tldr"])
@torch.no_grad()
def test_one_graph_and_no_recompilation_for_another_batch(merger: Any) -> None:
    torch.compiler.reset()
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(gm)
        return gm.forward

    model = small()
    schedule = Schedule(merge={0: 2, 1: 1}, by=merger_of(merger))
    fast, plain = optimize(model, schedule, backend=backend), optimize(model, schedule, backend="eager")
    for count, (batch, compiled) in enumerate([(2, 1), (3, 2), (5, 2), (7, 2)]):  # static at first, then dynamic
        images = torch.randn(batch, 3, 48, 48, generator=torch.Generator().manual_seed(count))
        torch.testing.assert_close(fast(images), plain(images))
        assert len(graphs) == compiled, f"batch {batch}: {len(graphs)} graphs"


@pytest.mark.parametrize("merger", ["stream", "tome", "vid-tldr"])
@torch.no_grad()
def test_the_same_ops_whatever_merges(merger: Any) -> None:
    def ops(side: int, r: int) -> list[str]:
        fast = optimize(small(side), Schedule(merge={0: r}, by=merger_of(merger)), backend="eager")
        fast(torch.randn(2, 3, side, side))
        return [str(node.target) for node in fast.graph_module().graph.nodes if node.op == "call_function"]

    assert ops(48, 1) == ops(48, 4) == ops(80, 9)
