"""Capture: symbolic batch, literal sizes, shared parameters, and a message where it cannot be done."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from graphs import Applies, graph_of, leaves, sample
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.capture.capture import FIXED_BATCH, OUT_SPEC, CaptureError, batched, capture
from passes.graph.base import CompileError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.register_buffer("shift", torch.randn(5))

    def forward(self, x: Tensor, gain: Tensor | None = None, *, mask: Tensor | None = None) -> dict[str, Any]:
        y = self.drop(self.norm(self.linear(x).mT).mT) + self.shift
        y = y if gain is None else y * gain
        y = y if mask is None else y * mask
        return {"tokens": y, "more": (y.mean(1), 7)}


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_batch_is_symbolic_and_tokens_are_literal(batch: int) -> None:
    model = Net().eval()
    gm = capture(model, (sample(batch=batch),), {})
    shape = next(n for n in gm.graph.nodes if n.op == "placeholder").meta["val"].shape
    assert isinstance(shape[0], torch.SymInt) and tuple(shape[1:]) == (6, 8)
    for other in (1, 2, 5):
        x = sample(batch=other)
        torch.testing.assert_close(gm(x)[0], model(x)["tokens"])


@torch.no_grad()
def test_output_is_flat_and_the_nesting_is_kept() -> None:
    model, x = Net().eval(), sample()
    gm = capture(model, (x,), {})
    found = gm(x)
    assert isinstance(found, tuple) and len(found) == 3 and found[2] == 7
    nested = pytree.tree_unflatten(found, OUT_SPEC.of(gm))
    torch.testing.assert_close(nested, model(x))


def test_parameters_and_buffers_are_shared() -> None:
    model = Net().eval()
    gm = capture(model, (sample(),), {})
    assert {id(p) for p in gm.parameters()} == {id(p) for p in model.parameters()}
    assert dict(gm.named_buffers())["shift"] is model.shift
    with torch.no_grad():
        before = gm(sample())[0]
        model.linear.weight.mul_(2)
        assert not torch.equal(gm(sample())[0], before)
    gm(sample())[0].sum().backward()
    assert model.linear.weight.grad is not None


@torch.no_grad()
def test_keyword_inputs_go_by_name() -> None:
    model = Net().eval()
    x, gain, mask = sample(), torch.randn(3, 1, 5), torch.randn(3, 6, 1)
    for args, kwargs in (
        ((x,), {"mask": mask}),
        ((x, gain), {"mask": mask}),
        ((x,), {"mask": mask, "gain": gain}),
    ):
        gm = capture(model, args, kwargs)
        flat = pytree.tree_leaves((args, kwargs))
        torch.testing.assert_close(gm(*flat)[0], model(*args, **kwargs)["tokens"])
        twice = [torch.cat([t, t]) for t in flat]
        wanted = model(
            *pytree.tree_unflatten(twice, pytree.tree_flatten((args, kwargs))[1])[0],
            **pytree.tree_unflatten(twice, pytree.tree_flatten((args, kwargs))[1])[1],
        )
        torch.testing.assert_close(gm(*twice)[0], wanted["tokens"])


class Gathers(nn.Module):
    """Takes whatever it is given, by position and by name."""

    def forward(self, *tensors: Tensor, scale: float = 1.0, **named: Tensor) -> Tensor:
        return sum(tensors, start=torch.zeros(())) * scale + sum(named.values())


@pytest.mark.parametrize("kwargs", [{}, {"b": sample()}, {"scale": 3.0, "b": sample(), "a": sample(seed=2)}])
def test_variable_arguments(kwargs: Mapping[str, Any]) -> None:
    args = (sample(seed=4), sample(seed=5))
    gm = capture(Gathers(), args, kwargs)
    torch.testing.assert_close(gm(*pytree.tree_leaves((args, dict(kwargs))))[0], Gathers()(*args, **kwargs))


def test_model_is_not_changed() -> None:
    model = Net().train()
    before = copy.deepcopy(model.state_dict())
    keys = set(vars(model))
    capture(model, (sample(),), {})
    assert model.training and model.norm.training and set(vars(model)) == keys
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_training_state_is_the_models(training: bool) -> None:
    gm = capture(Net().train(training), (sample(),), {})
    assert gm.training == training


def test_a_captured_graph_has_gradients_whatever_the_mode() -> None:
    with torch.no_grad():
        gm = capture(Net().eval(), (sample(),), {})
    assert gm(sample())[0].requires_grad


@pytest.mark.parametrize(
    ("leaves", "wanted"),
    [
        (
            [torch.zeros(3, 2), torch.zeros(3), torch.zeros(2, 3), torch.zeros(()), 5, None],
            [True, True] + [False] * 4,
        ),
        ([5, torch.zeros(()), torch.zeros(2, 3)], [False, False, True]),
        ([None], [False]),
        ([], []),
    ],
)
def test_which_inputs_run_over_samples(leaves: list[Any], wanted: list[bool]) -> None:
    assert batched(leaves) == wanted


class FixesBatch(nn.Module):
    """Its own code takes the number of samples for a constant."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(self.batch, -1) * 2


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_that_the_model_fixes(batch: int) -> None:
    x = sample(batch=batch)
    gm = capture(FixesBatch(batch), (x,), {})
    assert FIXED_BATCH.of(gm) == (batch if batch > 1 else 0)
    torch.testing.assert_close(gm(x)[0], 2 * x.flatten(1))
    assert not FIXED_BATCH.of(capture(Net().eval(), (x,), {}))


class Decides(nn.Module):
    """Reads a value of the image to decide what to do."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        if y.sum() > 0:
            return y
        return -y


def test_data_dependent_control_flow_names_the_models_line() -> None:
    with pytest.raises(CaptureError) as error:
        capture(Decides(), (sample(),), {})
    first, where, way_out = str(error.value).splitlines()
    assert first.startswith("torch.export cannot capture Decides: Could not guard on data-dependent expression")
    code = Decides.forward.__code__
    assert where == f"  in the model: {code.co_filename}, line {code.co_firstlineno + 2}, in forward"
    assert way_out == (
        "  way out: make that line independent of the data, or give the part of the model that it is not in"
    )
    assert isinstance(error.value, CompileError) and error.value.__cause__ is not None


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("images of 224 x 224 only")


def test_the_models_own_error_comes_through() -> None:
    with pytest.raises(CaptureError) as error:
        capture(Raises(), (sample(),), {})
    first, where, _ = str(error.value).splitlines()
    assert first == "torch.export cannot capture Raises: images of 224 x 224 only [RSC-202]"
    assert where.endswith(f"line {Raises.forward.__code__.co_firstlineno + 1}, in forward")


def test_two_inputs_of_one_batch() -> None:
    gm = graph_of(lambda x, y: x + y, sample(), sample(seed=3))
    (leaf,) = leaves(gm)
    assert isinstance(leaf.meta["val"].shape[0], torch.SymInt)
    assert gm(sample(batch=5), sample(batch=5, seed=3))[0].shape == (5, 6, 8)


class Cache:
    """A class that torch.export does not know."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


def test_an_output_of_an_unknown_class_is_named() -> None:
    with pytest.raises(CaptureError) as error:
        capture(Applies(lambda x: (x, Cache(x))), (sample(),), {})
    text = str(error.value)
    assert f"it returns a {Cache.__module__}.Cache, which torch.export does not know" in text
    assert "way out: call it so that it does not return that" in text and "register_pytree_node" in text


class CastsItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.router.to(torch.float32)(x)


def test_a_layer_that_is_cast_on_the_way_is_named() -> None:
    with pytest.raises(CaptureError) as error:
        capture(CastsItself(), (sample(),), {})
    first, where, way_out = str(error.value).splitlines()
    assert first.endswith(
        "it moves or casts a layer's own weights while it runs, which torch.export cannot record [RSC-202]"
    )
    assert "test_capture.py" in where and way_out.startswith("  way out: cast the model before")
