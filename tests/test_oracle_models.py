"""Real architectures, compiled, against the same pruning done by hand on the model's own modules."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, get_args

import oracle
import pytest
import torch
from oracle import Pruning
from schedules import handle_of, pruning_of
from torch import nn
from zoo import ZOO

import rs_compile

pytestmark = pytest.mark.usefixtures("captured_once")

TOLERANCE = 2e-4  # outputs are of order 1 to 10 and every block multiplies rounding errors
COMPILED = {"deit_tiny"}  # the others run by hand: -m slow
APART = 0.02  # what pruning must change at least: 100 times the tolerance

SCORES: list[tuple[oracle.Operation, oracle.Metric, bool]] = [
    (operation, metric, with_skip)
    for operation in get_args(oracle.Operation)
    for metric in get_args(oracle.Metric)
    for with_skip in ((False,) if operation == "block" else (False, True))  # a block always has its skips
]


@functools.cache
def model_of(name: str) -> nn.Module:
    return ZOO[name].model()


def optimized(name: str, pruning: Pruning, **options: Any) -> nn.Module:
    return handle_of(model_of(name), pruning_of(pruning), **options)


def check(name: str, compiled: nn.Module, pruning: Pruning, batch: int, tolerance: float = TOLERANCE) -> None:
    """The compiled model against the oracle, and both against the dense model."""
    entry = ZOO[name]
    model, images = model_of(name), entry.images(batch, seed=batch)
    wanted = entry.forward(model, images, pruning)
    assert wanted.margin > 1e-6, f"{name}: near tie {wanted.margin:.1e}, choose another seed"
    dense = oracle.named_outputs(model(images))
    for field, tensor in wanted.outputs.items():
        apart = oracle.max_difference(tensor, dense[field])
        assert apart > APART, f"{name} {field}: pruning changes only {apart:.1e}, the test could not fail"
    got = compiled(images)
    assert type(got) is type(model(images)), f"{name}: returned {type(got).__name__}"
    oracle.assert_close(got, wanted.outputs, tolerance, f"{name} batch {batch}")


@pytest.mark.parametrize("keep", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_pruned_equals_oracle(name: str, keep: float) -> None:
    ratios = {0: keep, 1: 0.8} if keep == 0.7 else {0: keep}
    pruning = Pruning(ratios, protected=ZOO[name].prefix)
    compiled = optimized(name, pruning)
    check(name, compiled, pruning, batch=3)
    check(name, compiled, pruning, batch=1)


@pytest.mark.parametrize("name", ["deit_tiny", "vit_all_tokens", "siglip", "hf_vit_eager", "torchvision_vit"])
@torch.no_grad()
def test_first_call_with_one_image(name: str) -> None:
    pruning = Pruning({0: 0.7, 1: 0.8}, protected=ZOO[name].prefix)
    compiled = optimized(name, pruning)
    check(name, compiled, pruning, batch=1)
    check(name, compiled, pruning, batch=3)


@pytest.fixture
def no_fused_inference() -> Iterator[None]:
    """Without gradients nn.MultiheadAttention takes a fused kernel of its own, which rounds differently."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("no_fused_inference")
@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_keep_ratio_one_is_the_model(name: str) -> None:
    compiled = optimized(name, Pruning({0: 1.0, 1: 1.0}))
    for batch in (3, 1):
        images = ZOO[name].images(batch)
        got, wanted = compiled(images), model_of(name)(images)
        assert type(got) is type(wanted)
        oracle.assert_close(got, wanted, 0.0, f"{name} batch {batch}")


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_keep_ratio_one_with_the_nodes_forced_in(name: str) -> None:
    compiled = optimized(name, Pruning({0: 1.0, 1: 1.0}), force_insert=True)
    images = ZOO[name].images(3)
    oracle.assert_close(compiled(images), model_of(name)(images), TOLERANCE, name)


@pytest.mark.parametrize(("operation", "metric", "with_skip"), SCORES)
@torch.no_grad()
def test_every_score_on_registers_and_layer_scale(
    operation: oracle.Operation, metric: oracle.Metric, with_skip: bool
) -> None:
    pruning = Pruning({0: 0.6}, operation, metric, with_skip, protected=5)
    check("dinov2_reg4", optimized("dinov2_reg4", pruning), pruning, batch=2)


@torch.no_grad()
def test_lowest_scores() -> None:
    pruning = Pruning({0: 0.6}, protected=5, lowest=True)
    check("dinov2_reg4", optimized("dinov2_reg4", pruning), pruning, batch=2)


@torch.no_grad()
def test_scores_choose_different_tokens() -> None:
    """The oracles of the test above are not all the same."""
    images = ZOO["dinov2_reg4"].images(2, seed=2)
    outputs = [
        oracle.timm_vit(model_of("dinov2_reg4"), images, Pruning({0: 0.6}, *score, protected=5)) for score in SCORES
    ]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            gap = oracle.max_difference(a.outputs["output"], b.outputs["output"])
            assert gap > APART, f"two scores agree within {gap:.1e}"


@torch.no_grad()
def test_called_by_keyword() -> None:
    pruning = Pruning({0: 0.7}, protected=1)
    images = ZOO["hf_vit"].images(2)
    got = optimized("hf_vit", pruning)(pixel_values=images)
    wanted = oracle.hf_vit(model_of("hf_vit"), images, pruning)
    oracle.assert_close(got, wanted.outputs, TOLERANCE, "hf_vit by keyword")


@torch.no_grad()
def test_protected_tokens_by_hand() -> None:
    """Protecting the first ten tokens keeps them, and counts them."""
    schedule = rs_compile.Schedule({0: 0.5, 1: 0.8}, protected=tuple(range(10)))
    images = ZOO["deit_tiny"].images(2)
    got = rs_compile.optimize(model_of("deit_tiny"), schedule, backend="eager")(images)
    ten, one = (
        oracle.timm_vit(model_of("deit_tiny"), images, Pruning({0: 0.5, 1: 0.8}, protected=count)) for count in (10, 1)
    )
    oracle.assert_close(got, ten.outputs, TOLERANCE, "ten protected tokens")
    gap = oracle.max_difference(ten.outputs["output"], one.outputs["output"])
    assert gap > APART, f"protecting ten tokens changes only {gap:.1e}"


@pytest.mark.parametrize("name", ["deit_tiny_distilled", "siglip", "hf_vit_eager", "torchvision_vit"])
@torch.no_grad()
def test_double_precision_leaves_no_room_for_small_errors(name: str) -> None:
    entry = ZOO[name]
    model, images = entry.model().double(), entry.images(2).double()
    pruning = Pruning({0: 0.7, 1: 0.8}, protected=entry.prefix)
    got = rs_compile.optimize(model, pruning.keep, backend="eager")(images)
    oracle.assert_close(got, entry.forward(model, images, pruning).outputs, 1e-6, name)


@pytest.mark.inductor
@pytest.mark.parametrize("name", [n if n in COMPILED else pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
@torch.no_grad()
def test_inductor_equals_oracle(name: str) -> None:
    pruning = Pruning({0: 0.7, 1: 0.8}, protected=ZOO[name].prefix)
    check(name, optimized(name, pruning, backend="inductor"), pruning, batch=2, tolerance=1e-3)
