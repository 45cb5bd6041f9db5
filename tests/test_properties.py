"""Properties that hold for every model and schedule, on generated transformers."""

from __future__ import annotations

from typing import Any

import hypothesis
import oracle
import pytest
import torch
from generated import Config, GeneratedViT
from hypothesis import strategies as st
from oracle import Pruning
from schedules import handle_of, pruning_of
from strategies import configs, prunings
from torch import Tensor, nn

import passes.device.pad_keys
import passes.pipeline
import passes.sites.insert
import passes.sites.select

TOLERANCE = 2e-4
CLEAR = 1e-4  # relative gap between the last kept and the first removed score: below, rounding decides


def optimized(model: nn.Module, pruning: Pruning, **options: Any) -> nn.Module:
    return handle_of(model, pruning_of(pruning), **options)


def kept_everything(config: Config) -> Pruning:
    return Pruning(dict.fromkeys(range(config.depth), 1.0))


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs every output element differently, for every parameter that has one."""
    weight = torch.linspace(-1.0, 1.0, output.numel()).reshape(output.shape)
    names, parameters = zip(*model.named_parameters(), strict=True)
    values = torch.autograd.grad((output * weight).sum(), parameters, allow_unused=True)
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert actual.keys() == expected.keys(), f"{what}: gradients of {actual.keys() ^ expected.keys()} differ"
    for name, wanted in expected.items():
        scale = max(1.0, wanted.abs().max().item())
        gap = oracle.max_difference(actual[name], wanted) / scale
        assert gap <= 1e-3, f"{what}: gradient of {name}: max abs difference {gap:.3e} of {scale:.1e}"


@hypothesis.given(config=configs(), batch=st.integers(1, 3))
@torch.no_grad()
def test_keep_ratio_one_is_bit_equal(config: Config, batch: int) -> None:
    model = GeneratedViT(config)
    images = model.images(batch)
    got, wanted = optimized(model, kept_everything(config))(images), model(images)
    gap = oracle.max_difference(got, wanted)
    assert torch.equal(got, wanted), f"max abs difference {gap:.3e} for {config}"


@hypothesis.given(config=configs(), batch=st.integers(1, 3))
def test_keep_ratio_one_with_the_nodes_forced_in(config: Config, batch: int) -> None:
    """Equality and gradients through the real scoring, gathering, retargeting and restoring nodes."""
    model = GeneratedViT(config)
    images = model.images(batch)
    got = optimized(model, kept_everything(config), force_insert=True)(images)
    wanted = model(images)
    oracle.assert_close(got, wanted, TOLERANCE, str(config))
    assert_same_gradients(gradients(model, got), gradients(model, wanted), str(config))


@hypothesis.given(data=st.data(), config=configs(), batch=st.integers(1, 3))
def test_pruned_equals_oracle_with_gradients(data: st.DataObject, config: Config, batch: int) -> None:
    model = GeneratedViT(config)
    pruning = data.draw(prunings(config))
    lower = data.draw(st.sampled_from((None, None, False, True)))
    images = model.images(batch)
    wanted = model.forward_pruned(images, pruning)
    hypothesis.assume(wanted.margin > CLEAR)
    got = optimized(model, pruning, lower_attention=lower)(images)
    oracle.assert_close(got, wanted.outputs, TOLERANCE, f"{config} {pruning}")
    expected = gradients(model, wanted.outputs["output"])
    assert_same_gradients(gradients(model, got), expected, f"{config} {pruning}")


@pytest.mark.parametrize("way", [pytest.param("compares", marks=pytest.mark.slow), "sorts"])
@hypothesis.given(data=st.data(), config=configs(), batch=st.integers(1, 3))
@torch.no_grad()
def test_what_other_processors_choose_is_as_right(
    way: passes.sites.select.Way, data: st.DataObject, config: Config, batch: int
) -> None:
    """A GPU's ways to select, and attention that matrix units would read whole tiles of keys for, on this CPU."""
    model = GeneratedViT(config)
    pruning = data.draw(prunings(config))
    images = model.images(batch)
    wanted = model.forward_pruned(images, pruning)
    hypothesis.assume(wanted.margin > CLEAR)
    with pytest.MonkeyPatch.context() as patch:
        for module in (passes.sites.select, passes.sites.insert):
            patch.setattr(module, "way", lambda *_: way)
        patch.setattr(passes.pipeline, "with_matrix_units", lambda: (torch.float32,))
        for limit, value in {"_PAYS": 1, "_FEWEST": 1}.items():
            patch.setattr(passes.device.pad_keys, limit, value)
        got = optimized(model, pruning)(images)
    oracle.assert_close(got, wanted.outputs, TOLERANCE, f"{way} {config} {pruning}")


@hypothesis.given(data=st.data(), config=configs())
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(data: st.DataObject, config: Config) -> None:
    model = GeneratedViT(config)
    pruning = data.draw(prunings(config))
    images = model.images(4)
    hypothesis.assume(model.forward_pruned(images, pruning).margin > CLEAR)
    compiled = optimized(model, pruning)
    together = compiled(images)
    for i in range(4):
        alone = compiled(images[i : i + 1])
        oracle.assert_close(together[i : i + 1], alone, TOLERANCE, f"sample {i} {config} {pruning}")
    backwards = compiled(images.flip(0)).flip(0)
    oracle.assert_close(together, backwards, TOLERANCE, f"reversed batch {config} {pruning}")
