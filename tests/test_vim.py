"""Vision Mamba, pruned by the compiler and by hand in eager code."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import randomise
from schedules import handle_of
from test_selective_scan import naive
from torch import Tensor, nn

from bench.models.vim import Layer, Mixer, VisionMamba
from rs_compile import Refusal, Schedule, Shift, TopViM, VidTLDR, explain, optimize
from rs_compile.models import ModelError, load_checkpoint
from rs_compile.schedule import Gap, Rounding


def tiny(side: int = 32, depth: int = 2, seed: int = 0) -> Any:
    """17 tokens by default, the class token ninth."""
    return randomise(VisionMamba(side, patch=8, classes=5, dim=16, depth=depth), seed).eval()


def images(batch: int = 3, side: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def mixer_by_hand(mixer: Any, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The mixer's output [B, n, C] and the gated scan [B, n, 2 C] before its last projection, step by step.

    And the gated scan of the backward direction in its own order, the last token first.
    """
    x, z = mixer.in_proj(x).chunk(2, dim=-1)
    total = torch.zeros_like(x)
    for suffix, reverse in (("", False), ("_b", True)):
        conv, x_proj, dt_proj = (getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
        taps = conv.weight.shape[-1]
        u = x.flip(1) if reverse else x
        u = F.silu(F.conv1d(F.pad(u.mT, (taps - 1, 0)), conv.weight, conv.bias, groups=x.shape[2]).mT)
        dt, b, c = x_proj(u).split([mixer.rank, mixer.states, mixer.states], dim=-1)
        where = None if positions is None else (-positions.flip(1) if reverse else positions)
        a = -torch.exp(mixer.A_b_log if reverse else mixer.A_log)
        y = naive(u, F.softplus(dt_proj(dt)), a, b, c, where, False) + (mixer.D_b if reverse else mixer.D) * u
        gate = F.silu(z.flip(1) if reverse else z)
        last = y * gate
        total = total + (last.flip(1) if reverse else last)
    return mixer.out_proj(total / 2), total / 2, last


@dataclass
class ByHand:
    """What pruning by hand gives: logits [B, classes], kept positions [B, K], and how clear the choice was."""

    logits: Tensor
    kept: Tensor
    margin: float = math.inf


@torch.no_grad()
def by_hand(model: Any, x: Tensor, schedule: Schedule) -> ByHand:
    patches = model.patch_embed["proj"](x).flatten(2).mT
    middle = patches.shape[1] // 2
    halves = [patches[:, :middle], model.cls_token.expand(len(x), -1, -1), patches[:, middle:]]
    stream = torch.cat(halves, 1) + model.pos_embed
    kept = torch.arange(stream.shape[1]).repeat(len(x), 1)
    margin = math.inf
    for i, layer in enumerate(model.layers):
        pruned = kept.shape[1] < patches.shape[1] + 1
        positions = kept if schedule.gap == "decay" and pruned else None
        hidden, gated, backward = mixer_by_hand(layer.mixer, layer.norm(stream), positions)
        score = (hidden - stream).norm(dim=-1)
        if schedule.score == TopViM():
            score = gated.clamp(min=0).mean(-1)
        elif schedule.score == TopViM("code"):
            score = backward.sum(-1)
        stream = stream + hidden
        if i not in schedule.keep:
            continue
        n, ratio = stream.shape[1], Fraction(str(schedule.keep[i]))
        left = n - int((1 - ratio) * n) if schedule.rounding == "removed" else max(1, int(ratio * n))
        chosen = []
        for b, values in enumerate(score.tolist()):
            rest = sorted((t for t in range(n) if kept[b, t] != middle), key=lambda t: -values[t])
            best, others = rest[: left - 1], rest[left - 1 :]
            if best and others:
                margin = min(margin, (values[best[-1]] - values[others[0]]) / max(values))
            own = [t for t in range(n) if kept[b, t] == middle]
            if schedule.score == TopViM("code"):
                best.sort()
                chosen.append(best[: len(best) // 2] + own + best[len(best) // 2 :])
            else:
                chosen.append(sorted(best + own))
        index = torch.tensor(chosen)
        stream = torch.stack([stream[b, rows] for b, rows in enumerate(index)])
        kept = kept.gather(1, index)
    class_token = stream[kept == middle]  # wherever it now stands in each sample
    return ByHand(model.head(model.norm_f(class_token)), kept, margin)


@torch.no_grad()
def check(model: Any, x: Tensor, schedule: Schedule, backend: str = "eager") -> None:
    wanted = by_hand(model, x, schedule)
    assert wanted.margin > 1e-4, "the choice is too close to call; take another seed"
    got = optimize(model, schedule, backend=backend)(x)
    torch.testing.assert_close(got, wanted.logits, rtol=2e-4, atol=2e-4)
    last = len(model.layers) - 1  # behind which nothing changes for the class token
    early = replace(schedule, keep={i: ratio for i, ratio in schedule.keep.items() if i < last})
    if by_hand(model, x, early).kept.shape[1] < model.pos_embed.shape[1]:
        assert (got - model(x)).abs().max() > 1e-3  # or the comparison would show nothing


def test_parameters_and_keys() -> None:
    model = VisionMamba()
    assert sum(p.numel() for p in model.parameters()) == 7_148_008
    mixer = {"A_log", "D", "A_b_log", "D_b", "in_proj.weight", "out_proj.weight"}
    for suffix in ("", "_b"):
        mixer |= {f"conv1d{suffix}.weight", f"conv1d{suffix}.bias", f"x_proj{suffix}.weight"}
        mixer |= {f"dt_proj{suffix}.weight", f"dt_proj{suffix}.bias"}
    keys = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm_f.weight"}
    keys |= {"head.weight", "head.bias", *(f"layers.{i}.norm.weight" for i in range(24))}
    assert model.state_dict().keys() == keys | {f"layers.{i}.mixer.{key}" for i in range(24) for key in mixer}
    shapes = {key: list(value.shape) for key, value in model.layers[0].mixer.state_dict().items()}
    assert shapes["x_proj.weight"] == [44, 384] and shapes["A_b_log"] == [384, 16]
    assert shapes["conv1d.weight"] == [384, 1, 4] and shapes["in_proj.weight"] == [768, 192]


def test_checkpoints_load_strictly(tmp_path: Path) -> None:
    model, other = tiny(), tiny(seed=1)
    torch.save({"model": other.state_dict(), "epoch": 3}, tmp_path / "vim.pth")
    load_checkpoint(model, tmp_path / "vim.pth")
    assert torch.equal(model(images()), other(images()))
    weights = {k: v for k, v in other.state_dict().items() if k != "layers.1.mixer.A_b_log"}
    safetensors.torch.save_file(weights | {"layers.9.norm.weight": torch.ones(16)}, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match=r"missing in the file: layers\.1\.mixer\.A_b_log; left over.*layers\.9\.norm"):
        load_checkpoint(model, tmp_path / "odd.safetensors")


def test_the_model_is_its_definition() -> None:
    model, x = tiny(), images()
    torch.testing.assert_close(model(x), by_hand(model, x, Schedule({})).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule({0: 0.7, 1: 0.7, 2: 0.2}),
        Schedule({0: 0.7, 1: 0.7}, gap="decay"),
        Schedule({0: 0.8, 1: 0.8}, rounding="kept", score=TopViM()),
        Schedule({0: 0.8, 1: 0.9}, rounding="kept", score=TopViM("code")),
    ],
    ids=["compact", "decay", "ToP-ViM", "ToP-ViM as its code"],
)
def test_pruned_as_by_hand(schedule: Schedule) -> None:
    check(tiny(depth=3), images(), schedule)


@settings(max_examples=5)
@given(
    side=st.sampled_from([16, 24, 40]),
    ratio=st.sampled_from([0.3, 0.5, 0.75, 0.9]),
    batch=st.integers(1, 4),
    gap=st.sampled_from(get_args(Gap)),
    rounding=st.sampled_from(get_args(Rounding)),
    seed=st.integers(0, 5),
)
def test_any_size_and_count(side: int, ratio: float, batch: int, gap: Gap, rounding: Rounding, seed: int) -> None:
    model, x = tiny(side, 2, seed), images(batch, side, seed)
    schedule = Schedule({0: ratio}, gap=gap, rounding=rounding)
    assume(by_hand(model, x, schedule).margin > 1e-4)
    check(model, x, schedule)


@torch.no_grad()
def test_keeping_everything_is_bit_equal() -> None:
    model, x = tiny(), images()
    assert torch.equal(optimize(model, {0: 1.0}, backend="eager")(x), model(x))
    for gap in get_args(Gap):
        forced = handle_of(model, Schedule({0: 1.0}, gap=gap), force_insert=True)
        assert torch.equal(forced(x), model(x))


@torch.no_grad()
def test_samples_do_not_see_each_other() -> None:
    x = images(4)
    optimized = optimize(tiny(), Schedule({0: 0.6}, gap="decay"), backend="eager")
    alone = torch.cat([optimized(sample) for sample in x.split(1)])
    torch.testing.assert_close(optimized(x), alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bfloat16_with_its_float32_stream() -> None:
    """Every block is found, the first of which adds to a cast."""
    model = tiny().bfloat16()
    explained = explain(model, images().bfloat16())
    assert [(row.where, row.kind, row.tokens, row.prunable) for row in explained.rows] == [
        (f"layers.{i}", "mixer", 17, True) for i in range(2)
    ]
    optimized = optimize(model, {0: 0.5}, backend="eager")
    assert optimized(images().bfloat16()).dtype == torch.bfloat16
    assert [row.tokens_out for row in optimized.report().blocks] == [9, 9]


def test_gradients_reach_every_parameter() -> None:
    model = tiny()
    optimize(model, Schedule({0: 0.6}, gap="decay"), backend="eager")(images()).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def flops(tokens: list[int]) -> int:
    """Of a ViM-T that sees so many tokens in each layer: two convolutions and scans, five projections a layer."""
    inner, states, rank = 384, 16, 12
    two_ways = inner * 4 + inner * (rank + 2 * states) + rank * inner + 4 * inner * states
    layer = 192 * 2 * inner + 2 * two_ways + inner * 192
    return 196 * 3 * 16 * 16 * 192 + layer * sum(tokens) + 192 * 1000


@torch.no_grad()
def counted(depth: int, keep: dict[int, float], after: list[int]) -> tuple[int, int]:
    optimized = optimize(
        VisionMamba(depth=depth).eval(), Schedule(keep, rounding="kept"), backend="eager", drop_unread=False
    )
    optimized(torch.zeros(1, 3, 224, 224))
    report = optimized.report()
    assert [row.tokens_out for row in report.blocks] == after and report.skips == ()
    return report.flops_dense, report.flops


def test_what_a_layer_costs() -> None:
    assert counted(3, {0: 0.8, 1: 0.8}, [157, 125, 125]) == (flops([197] * 3), flops([197, 157, 125]))


@pytest.mark.slow
def test_gflops_of_the_paper() -> None:
    dense, pruned = counted(24, {9: 0.8, 19: 0.8}, [197] * 9 + [157] * 10 + [125] * 5)
    assert (dense, pruned) == (flops([197] * 24), flops([197] * 10 + [157] * 10 + [125] * 4))
    assert (round(dense / 1e9, 3), round(pruned / 1e9, 3)) == (1.525, 1.307)


@pytest.mark.inductor
def test_compiled() -> None:
    check(tiny(side=24), images(2, 24), Schedule({0: 0.6}, gap="decay"), backend="inductor")


class Transformer(nn.Module):
    """One block with an MLP, and nothing that scans."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.down(self.up(x).relu())).mean(1)


class OneWay(VisionMamba):
    """Its mixers scan forward alone."""

    def __init__(self) -> None:
        super().__init__(32, patch=8, classes=5, dim=16, depth=2)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.mixer.forward = partial(_forward_alone, layer.mixer)


def _forward_alone(mixer: Mixer, x: Tensor) -> Tensor:
    x, z = mixer.in_proj(x).chunk(2, dim=-1)
    y = mixer._scan(x, mixer.conv1d, mixer.x_proj, mixer.dt_proj, mixer.A_log, mixer.D, False)
    return mixer.out_proj(y * F.silu(z))


def test_refusals() -> None:
    x = torch.randn(2, 6, 8)
    with pytest.raises(Refusal, match="no op carries a state that could decay over the gaps of pruned tokens") as e:
        optimize(Transformer(), Schedule({0: 0.5}, gap="decay"), backend="eager")(x)
    assert 'use Schedule(gap="compact")' in str(e.value) and "x + self.down" in str(e.value)
    with pytest.raises(Refusal, match="block 0 has no mixer that ends in a linear layer, whose input ToP-ViM scores"):
        optimize(Transformer(), Schedule({0: 0.5}, score=TopViM()), backend="eager")(x)
    with pytest.raises(Refusal, match="block 0 does not end in the sum of a scan forward and one backward") as e:
        optimize(OneWay(), Schedule({0: 0.5}, score=TopViM("code")), backend="eager")(images())
    assert "use Schedule(score=TopViM()), which scores both together" in str(e.value)
    code = Schedule({0: 0.5}, score=TopViM("code"), protected=(2, 3))
    with pytest.raises(Refusal, match="3 tokens are protected, and this score puts the one that there is in the"):
        optimize(tiny(), code, backend="eager")(images())
    with pytest.raises(Refusal, match="depends on the order of the tokens, which this merger changes") as e:
        optimize(tiny(), Schedule({}, merge={0: 4}, by=VidTLDR(Shift())), backend="eager")(images())
    assert "vim.causal_conv1d.default" in str(e.value) and "use Schedule(by=Stream())" in str(e.value)
    with pytest.raises(Refusal, match="block 0 has no attention branch to score by"):
        optimize(tiny(), Schedule({0: 0.5}, score=Shift(of="attention")), backend="eager")(images())
