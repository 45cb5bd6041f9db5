"""`torch.compile(model, backend="rs_compile")` against `optimize` of the same model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from runtimes import Encoder, encoder, images
from torch import Tensor, nn

import rs_compile
from passes.graph.base import CompileError, Refusal
from rs_compile.dynamo import backend

SCHEDULE = {0: 0.8, 1: 0.6}
OPTIONS: dict[str, Any] = {"schedule": SCHEDULE, "backend": "eager"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module, options: Any = OPTIONS, **told: Any) -> Any:
    return torch.compile(model, backend=backend, options=options, **told)


def optimized(model: nn.Module, *inputs: Any) -> Any:
    return rs_compile.optimize(model, SCHEDULE, backend="eager")(*inputs)


def assert_same(found: Any, wanted: Any, model: nn.Module, *inputs: Any) -> None:
    """Equal to what `optimize` gives, and not to the dense model."""
    torch.testing.assert_close(found["logits"], wanted["logits"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found["tokens"][0], wanted["tokens"][0], rtol=0, atol=1e-6)
    assert (found["logits"] - model(*inputs)["logits"]).abs().max() > 1e-3


def test_registered() -> None:
    """`pip install` wrote the entry point, and torch finds the backend by it."""
    (found,) = entry_points(group="torch_dynamo_backends", name="rs_compile")
    assert found.load() is backend
    assert "rs_compile" in torch._dynamo.list_backends()


@torch.no_grad()
def test_equal_to_optimize() -> None:
    model, x = encoder(), images(2)
    assert_same(compiled(model)(x), optimized(model, x), model, x)


@torch.no_grad()
def test_fullgraph_and_one_sample() -> None:
    """Dynamo writes a batch of one into the graph."""
    model = encoder()
    fast = compiled(model, fullgraph=True)
    for x in (images(1), images(3)):
        assert_same(fast(x), optimized(model, x), model, x)


@torch.no_grad()
def test_dynamic() -> None:
    """Image sizes are symbols in Dynamo's graph; each size is captured for itself."""
    model = encoder()
    fast = compiled(model, dynamic=True)
    for x in (images(2), images(3), torch.randn(2, 3, 48, 48)):
        assert_same(fast(x), optimized(model, x), model, x)


@torch.no_grad()
def test_a_second_image_size() -> None:
    model = encoder()
    fast = compiled(model)
    for size in (32, 48, 40):
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
        assert_same(fast(x), optimized(model, x), model, x)


def test_training_mode() -> None:
    """Gradients reach the model's own parameters, and a step is seen by the next call."""
    model = encoder().train()
    twin = copy.deepcopy(model)
    fast, other = compiled(model), rs_compile.optimize(twin, SCHEDULE, backend="eager")
    for m in (model, twin):
        step = torch.optim.SGD(m.parameters(), lr=0.1)
        for _ in range(2):
            step.zero_grad()
            (fast if m is model else other)(images(3))["logits"].square().sum().backward()
            step.step()
    for (name, mine), its in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, its, msg=name)
    assert model.blocks[0].qkv.weight.grad is not None and model.blocks[0].qkv.weight.grad.abs().max() > 0


@torch.no_grad()
def test_other_weights_are_seen() -> None:
    """Dynamo passes them to the graph that it has."""
    model, x = encoder(), images(2)
    fast = compiled(model)
    fast(x)
    other = Encoder().eval()
    model.load_state_dict(other.state_dict(), assign=True)
    assert_same(fast(x), optimized(other, x), other, x)


class Broken(Encoder):
    """Breaks the graph at a place."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def forward(self, pixels: Tensor) -> Any:
        x = torch.cat([self.token.expand(pixels.shape[0], -1, -1), self.patches(pixels).flatten(2).mT], 1)
        if self.at == "in front":
            torch._dynamo.graph_break()
        x = self.blocks[0](x)
        if self.at == "between":
            torch._dynamo.graph_break()
        for i, block in enumerate(self.blocks[1:]):
            if self.at == "in a loop" and i == 1:
                torch._dynamo.graph_break()
            x = block(x)
        x = x[:, 0]
        if self.at == "behind":
            torch._dynamo.graph_break()
        return self.head(x)


@torch.no_grad()
@pytest.mark.parametrize("at", ["in front", "behind"])
def test_graph_breaks_without_tokens_to_leave_across_them(at: str) -> None:
    torch.manual_seed(0)
    model, x = Broken(at).eval(), images(2)
    found, wanted = compiled(model)(x), optimized(model, x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert (found - model(x)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("schedule", [{0: 0.5}, {0: 0.5, 2: 0.5}, {2: 0.5}])
@pytest.mark.parametrize("at", ["between", "in a loop"])
def test_tokens_do_not_leave_for_another_graph(at: str, schedule: dict[int, float]) -> None:
    model = Broken(at).eval()
    with pytest.raises(Refusal) as caught:
        compiled(model, {**OPTIONS, "schedule": schedule})(images(2))
    text = str(caught.value)
    assert text.startswith("torch.compile gives the model in parts, since ") and "test_dynamo.py:" in text
    assert "way out: rs_compile.optimize(model, schedule)" in text


@torch.no_grad()
def test_a_graph_without_blocks_is_compiled_as_it_is() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)).eval(), torch.randn(3, 8)
    assert torch.equal(compiled(model)(x), model(x))

    def no_weights(x: Tensor) -> Tensor:
        return x.softmax(-1) + 1

    assert torch.equal(torch.compile(no_weights, backend=backend, options=OPTIONS)(x), no_weights(x))


def test_options_are_read_before_anything_runs() -> None:
    model, x = encoder(), images(2)
    for options, words in (
        ({"backend": "eager"}, r"told no schedule; write options=\{\"schedule\": \{0: 0.8"),
        ({**OPTIONS, "outputs": ("logits",)}, r"options names outputs; write some of backend, .* rs_compile.optimize"),
        ({**OPTIONS, "schedule": {0: 1.5}}, "1.5"),
    ):
        with pytest.raises(Exception, match=words):
            compiled(model, options)(x)
    with pytest.raises(CompileError, match="names block 9, but the model has 3 blocks"):
        compiled(model, {**OPTIONS, "schedule": {9: 0.5}})(x)
