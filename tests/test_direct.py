"""Which calls run what Inductor made of the first one, and which Dynamo follows."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx as inductor
from generated import Config, GeneratedViT
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.fx import Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rs_compile
from passes.capture.capture import capture
from rs_compile.direct import direct
from rs_compile.inductor import flattened


class Scaled(nn.Module):
    """Arithmetic with a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x: Tensor, y: Tensor, flag: bool = True) -> Tensor:
        return x @ self.weight + self.shift - y if flag else y


class Runs:
    """The two ways a graph can run, with Inductor replaced by the graph itself; which calls went where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: nn.Module, *args: Any) -> None:
        self.went: list[str] = []
        self.compiled = 0
        self.gm = flattened(capture(model.eval(), args, {}))
        monkeypatch.setattr(inductor, "compile_fx", self._compile_fx)
        self.run = direct(self.gm, {}, self._dynamo)

    def _compile_fx(self, gm: Any, inputs: Any, **options: Any) -> Callable[..., Any]:
        self.compiled += 1
        assert all(isinstance(out, Node) for out in gm.graph.output_node().args[0])

        def run(*leaves: Any) -> Any:
            self.went.append("inductor")
            return gm(*leaves)

        return run

    def _dynamo(self, *leaves: Any) -> Any:
        self.went.append("dynamo")
        return self.gm(*leaves)

    def way(self, *leaves: Any) -> str:
        """Where a call goes, which gives the graph's own outputs."""
        before = len(self.went)
        (got,) = self.run(*leaves)
        (way,) = self.went[before:]
        assert torch.equal(got, self.gm(*leaves)[0])
        return way


def pair(batch: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 4), torch.randn(batch, 4)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """Compiled for one call, without gradients."""
    torch.manual_seed(0)
    made = Runs(monkeypatch, Scaled(), *pair())
    with torch.no_grad():
        assert made.way(*pair()) == "inductor"
        yield made


def test_calls_like_the_first(runs: Runs) -> None:
    """Other values, in the tensors and in the parameters, and whatever was between."""
    assert runs.way(*pair()) == "inductor"
    assert runs.way(*pair(5)) == "dynamo"
    with torch.enable_grad():
        assert runs.way(*pair()) == "dynamo"
    next(runs.gm.parameters()).mul_(2)
    assert runs.way(*pair()) == "inductor"
    assert runs.compiled == 1


class Sub(Tensor):
    pass


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: (x[:2], y[:2]),
        lambda x, y: (x.t().contiguous().t(), y),
        lambda x, y: (torch.cat([x, x], 1)[:, :4], y),
        lambda x, y: (x, y.requires_grad_()),
        lambda x, y: (x.as_subclass(Sub), y.as_subclass(Sub)),
        lambda x, y: (x, torch._neg_view(y)),
    ],
    ids=["size", "stride", "part", "gradient", "subclass", "negative"],
)
def test_tensors_of_another_kind(runs: Runs, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    assert runs.way(*change(*pair())) == "dynamo"
    assert runs.way(*pair()) == "inductor"


@pytest.mark.parametrize("change", ["size", "stride", "gradient"])
def test_another_kind_of_parameter(runs: Runs, change: str) -> None:
    """`param.data = ...` keeps the parameter, and with it the plan."""
    weight = next(runs.gm.parameters())
    if change == "size":
        weight.data = torch.randn(4, 1)
    elif change == "stride":
        weight.data = weight.data.t()
    else:
        weight.requires_grad_(False)
    assert runs.way(*pair()) == "dynamo"


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Overriding(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def setting(turn: Callable[[Any], None], on: Any, off: Any) -> Iterator[None]:
    turn(on)
    try:
        yield
    finally:
        turn(off)


@pytest.mark.parametrize(
    "around",
    [
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        Overriding,
        forward_ad.dual_level,
        lambda: torch.compiler.set_stance("force_eager"),
        lambda: torch._dynamo.config.patch(disable=True),
        lambda: setting(torch.set_num_threads, torch.get_num_threads() + 1, torch.get_num_threads()),
        lambda: setting(torch.use_deterministic_algorithms, True, False),
        lambda: setting(torch.set_float32_matmul_precision, "high", "highest"),
        lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    ],
    ids=[
        *("inference", "autocast", "function", "dual", "stance", "disabled"),
        *("threads", "deterministic", "precision", "dtype"),
    ],
)
def test_another_state_of_torch(runs: Runs, around: Callable[[], AbstractContextManager[Any]]) -> None:
    given = pair()
    with around():
        assert runs.way(*given) == "dynamo"
    assert runs.way(*given) == "inductor"


def in_a_trace(run: Callable[..., Any], *given: Tensor) -> None:
    with pytest.MonkeyPatch.context() as patch:  # torch.jit.trace itself is deprecated
        patch.setattr(torch._C, "_get_tracing_state", lambda: object())
        run(*given)


def in_a_transform(run: Callable[..., Any], *given: Tensor) -> None:
    torch.func.vmap(run)(*(torch.stack([t, t]) for t in given))


def in_a_mode(run: Callable[..., Any], *given: Tensor) -> None:
    with Watching():
        run(*given)


def in_a_compiled_function(run: Callable[..., Any], *given: Tensor) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        run(*given)


def with_gradients(run: Callable[..., Any], *given: Tensor) -> None:
    with torch.enable_grad():
        run(*given)


def on_a_subclass(run: Callable[..., Any], *given: Tensor) -> None:
    run(*(t.as_subclass(Sub) for t in given))


def twice_the_same(run: Callable[..., Any], x: Tensor, y: Tensor) -> None:
    run(x, x)


CALLS = [
    in_a_trace,
    in_a_transform,
    in_a_mode,
    in_a_compiled_function,
    with_gradients,
    on_a_subclass,
    twice_the_same,
]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_torch_compile_has_to_see(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, call: Callable[..., None]
) -> None:
    """The first call too, for which nothing is compiled; the next is compiled for."""
    call(runs.run, *pair())
    first = Runs(monkeypatch, Scaled(), *pair())
    call(first.run, *pair())
    assert runs.went[-1] == "dynamo" and set(first.went) == {"dynamo"} and not first.compiled
    assert first.way(*pair()) == "inductor"


def test_an_input_that_is_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan belongs to its value, which the graph holds."""
    runs = Runs(monkeypatch, Scaled(), *pair(), True)
    with torch.no_grad():
        assert runs.way(*pair(), True) == "inductor"


class Constants(nn.Module):
    """Returns what is no tensor as well."""

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return None, x + 1, 5, x * 2


def test_outputs_that_are_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor takes tensors."""
    x, _ = pair()
    runs = Runs(monkeypatch, Constants(), x)
    with torch.no_grad():
        none, more, five, twice = runs.run(x)
    assert runs.went == ["inductor"] and (none, five) == (None, 5)
    assert torch.equal(more, x + 1) and torch.equal(twice, x * 2)


def test_parameters_of_another_library(runs: Runs) -> None:
    """As torchao's, which the code behind a graph may read in their own way."""
    kept = dict(runs.gm.named_parameters())
    for name, parameter in kept.items():
        runs.gm._parameters[name] = nn.Parameter(parameter.detach().as_subclass(Sub))
    assert direct(runs.gm, {}, runs._dynamo) == runs._dynamo


class Counting(nn.Module):
    """Writes into a buffer at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


class Within(nn.Module):
    """Writes into a value of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).mul_(2)


def test_a_graph_that_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = pair()
    with torch.no_grad():
        counting = Runs(monkeypatch, Counting(), x)
        counting.run(x)
        counting.run(x)
        assert counting.went == ["dynamo"] * 2 and not counting.compiled
        assert Runs(monkeypatch, Within(), x).way(x) == "inductor"


def test_torch_that_does_not_take_the_graph(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What is called is torch's own, and may be another thing in another version."""
    runs = Runs(monkeypatch, Scaled(), *pair())
    tried: list[int] = []

    def missing(*args: Any, **options: Any) -> Any:
        tried.append(1)
        raise TypeError("unexpected keyword")

    monkeypatch.setattr(inductor, "compile_fx", missing)
    with torch.no_grad(), caplog.at_level(logging.INFO, "rs_compile"):
        assert [runs.way(*pair()) for _ in range(2)] == ["dynamo"] * 2
    assert len(tried) == 1 and "unexpected keyword" in caplog.text


@pytest.mark.inductor
def test_the_first_call_needs_no_dynamo() -> None:
    """And gives what the uncompiled graph gives; nor does any call like it, another size does."""
    model = GeneratedViT(Config(depth=1, width=16)).eval()
    handle, eager = (rs_compile.optimize(model, {0: 0.5}, backend=b) for b in ("inductor", "eager"))
    before = counters["frames"]["ok"]
    with torch.no_grad():
        for images in (model.images(3), model.images(3) * 2):
            torch.testing.assert_close(handle(images), eager(images), rtol=2e-4, atol=2e-4)
        assert counters["frames"]["ok"] == before
        torch.testing.assert_close(handle(model.images(2)), eager(model.images(2)), rtol=2e-4, atol=2e-4)
        assert counters["frames"]["ok"] == before + 1
