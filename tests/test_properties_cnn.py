"""Properties that hold for every CNN and every cut, on generated networks."""

from __future__ import annotations

from typing import Any

import hypothesis
import oracle
import oracle_cnn
import pytest
import torch
from generated_cnn import Config, GeneratedCNN, configs, cuts, parts
from hypothesis import strategies as st
from oracle_cnn import Cut
from schedules import handle_of

import rs_compile
from passes.sites.grid_prune import GridPrune

TOLERANCE = 2e-4
CLEAR = 1e-5  # relative gap between what stays and what leaves: below, rounding decides


def optimized(model: GeneratedCNN, chosen: dict[int, Cut], **options: Any) -> rs_compile.OptimizedModel:
    grid = {i: GridPrune(**vars(cut)) for i, cut in chosen.items()}
    return handle_of(model, rs_compile.Schedule(grid=grid), **options)


def sizes(model: GeneratedCNN) -> list[tuple[int, int]]:
    with torch.no_grad():
        walked = oracle_cnn.walk(parts(model.eval()), model.images(1), {})
    return [tuple(stage.shape[2:]) for stage in walked.stages]


@hypothesis.settings(max_examples=8)
@hypothesis.given(data=st.data(), config=configs(), train=st.booleans())
def test_pruned_equals_oracle_with_gradients(data: st.DataObject, config: Config, train: bool) -> None:
    model = GeneratedCNN(config)
    chosen = data.draw(cuts(sizes(model)))
    model.train(train)
    images = model.images(3)
    try:
        wanted = oracle_cnn.walk(parts(model), images, chosen)
    except RuntimeError:  # a kernel larger than what is left
        with pytest.raises(rs_compile.Refusal, match="does not run on the smaller grid"):
            optimized(model, chosen)(images)
        return
    hypothesis.assume(wanted.margin > CLEAR)
    got = optimized(model, chosen)(images)
    oracle.assert_close(got, wanted.output, TOLERANCE, f"{config} {chosen}")
    weight = torch.linspace(-1.0, 1.0, got.numel()).reshape(got.shape)
    both = [torch.autograd.grad((out * weight).sum(), list(model.parameters())) for out in (got, wanted.output)]
    for (name, _), a, b in zip(model.named_parameters(), *both, strict=True):
        scale = max(1.0, b.abs().max().item())
        assert oracle.max_difference(a, b) <= 1e-3 * scale, f"gradient of {name}: {config} {chosen}"


@hypothesis.settings(max_examples=4)
@hypothesis.given(data=st.data(), config=configs())
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(data: st.DataObject, config: Config) -> None:
    model = GeneratedCNN(config)
    chosen = data.draw(cuts(sizes(model)))
    images = model.eval().images(3)
    try:
        hypothesis.assume(oracle_cnn.walk(parts(model), images, chosen).margin > CLEAR)
    except RuntimeError:
        hypothesis.reject()
    compiled = optimized(model, chosen)
    together = compiled(images)
    oracle.assert_close(compiled(images[1:2]), together[1:2], TOLERANCE, f"alone {config} {chosen}")
    oracle.assert_close(compiled(images.flip(0)).flip(0), together, TOLERANCE, f"reversed {config} {chosen}")


@hypothesis.settings(max_examples=4)
@hypothesis.given(config=configs(), mode=st.sampled_from(("line", "token")))
@torch.no_grad()
def test_keeping_everything_is_bit_equal(config: Config, mode: str) -> None:
    model = GeneratedCNN(config).eval()
    everything = {i: Cut(0, 0, mode) for i in range(len(config.depths))}
    images = model.images(2)
    assert torch.equal(optimized(model, everything)(images), model(images)), config
    forced = optimized(model, everything, force_insert=True)(images)
    oracle.assert_close(forced, model(images), TOLERANCE, str(config))
