"""Reasons and ways out that hold: parallel branches, hooks inside, attention maps as outputs, quantised activations."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from oracle import Pruning
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import ViTConfig, ViTModel
from zoo import ZOO

import rs_compile
from passes.graph.base import Refusal


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(16), nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(*self.qkv(self.norm(x)).chunk(3, -1))


class Parallel(nn.Module):
    """Two MLPs in one sum, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention() for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, attention in enumerate(self.attention):
            x = x + attention(x)
            x = x + self.mlps[2 * i](x) + self.mlps[2 * i + 1](x)
        return x.mean(1)


def tokens() -> Tensor:
    return torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))


def test_parallel_branches_of_one_sum_are_pruned_once() -> None:
    model = Parallel().eval()
    with pytest.raises(Refusal) as refusal:
        rs_compile.plan(model, {0: 0.7, 1: 0.7}, tokens())
    assert refusal.value.reason == "blocks 0 and 1 are parallel branches of one sum, after which tokens leave once"
    assert refusal.value.way_out == "schedule one of them: block 0 with the product of both keep ratios"
    assert rs_compile.plan(model, {0: 0.49}, tokens()).blocks[1].tokens_out == 6  # of 12, the way out
    assert rs_compile.plan(model, {0: 0.7, 1: 1.0, 2: 0.7}, tokens()).blocks[3].tokens_out == 7  # 12 -> 9 -> 7
    assert rs_compile.explain(model, tokens()).notes == (
        "blocks 0 and 1 are parallel branches of one sum: tokens leave after one of them",
        "blocks 2 and 3 are parallel branches of one sum: tokens leave after one of them",
    )


def test_hooks_inside_do_not_run_and_the_report_says_so() -> None:
    model, seen = Parallel().eval(), []
    fast = rs_compile.optimize(model, {0: 0.5}, backend="eager")
    fast(tokens())
    assert "hooks" not in str(fast.report())
    model.mlps[2].register_forward_hook(lambda *given: seen.append(given[-1]))
    fast(tokens())
    count = len(seen)
    fast(tokens())
    assert len(seen) == count
    assert "hooks on modules inside (mlps.2) do not run at a call: what they compute is in the graph, what" in str(
        fast.report()
    )


def test_attention_maps_as_outputs_name_what_helps() -> None:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        attn_implementation="eager",
    )  # fmt: skip
    model, images = ViTModel(config).eval(), torch.randn(2, 3, 32, 32)
    fast = rs_compile.optimize(model, {0: 0.5}, backend="eager")
    with pytest.raises(Refusal, match="an output of the model") as refusal:
        fast(images, output_attentions=True)
    assert refusal.value.way_out.startswith("call the model without that output (output_attentions=False, say)")
    fast(images)
    last = rs_compile.optimize(model, {2: 0.5}, backend="eager")  # the way out's other half
    assert len(last(images, output_attentions=True).attentions) == 3


@torch.no_grad()
def test_quantised_activations() -> None:
    """int8 activations, a scale a token: pruned as the model is by hand, at the costs of the model in float."""
    entry, pruning = ZOO["hf_vit_eager"], Pruning({0: 0.7, 1: 0.8}, protected=1)
    model, images = entry.model(), entry.images(2)
    plain = rs_compile.plan(model, pruning.keep, images)
    dense = entry.forward(model, images, pruning).outputs
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    # with SDPA in the place of its softmax an activation may round to the next of 256 steps
    fast: Any = rs_compile.optimize(model, pruning.keep, backend="eager", lower_attention=False)
    wanted = entry.forward(model, images, pruning).outputs
    assert max(oracle.max_difference(wanted[k], dense[k]) for k in dense) > 1e-4, "quantisation changes nothing"
    oracle.assert_close(fast(images), wanted, 0.0, "quantised")
    report = fast.report()
    assert (report.macs, report.flops) == (plain.macs, plain.flops)
