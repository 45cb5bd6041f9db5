"""What a model's code keeps while it is traced: real values afterwards, or a refusal and the model as it was."""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

import rs_compile

WIDTH = 8
TABLES: dict[int, Tensor] = {}


def made(n: int) -> Tensor:
    return torch.linspace(0, 1, n)[:, None].repeat(1, WIDTH)


cached = functools.lru_cache(made)


class Slotted:
    __slots__ = ("table",)

    def __init__(self) -> None:
        self.table: Tensor | None = None


class Net(nn.Module):
    """Two blocks behind a table by the number of tokens, which each subclass keeps in a place of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)) for _ in range(2)
        )
        self.held: dict[Any, Any] = {}
        self.slotted = Slotted()
        self.remembered = remembering()

    def table(self, x: Tensor) -> Any:
        return made(x.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table(x)
        for mlp in self.blocks:
            x = x + x.softmax(1).mean(1, keepdim=True)
            x = x + mlp(x)
        return x


def remembering() -> Any:
    kept: Tensor | None = None

    def table(n: int) -> Tensor:
        nonlocal kept
        if kept is None or len(kept) != n:
            kept = made(n)
        return kept

    return table


class InLruCache(Net):
    def table(self, x: Tensor) -> Any:
        return cached(x.shape[1])


class InMethodCache(Net):
    cached = functools.cache(lambda self, n: made(n))

    def table(self, x: Tensor) -> Any:
        return self.cached(x.shape[1])


class InDict(Net):
    def table(self, x: Tensor) -> Any:
        if x.shape[1] not in self.held:
            self.held[x.shape[1]] = made(x.shape[1]).to(x.device)
        return self.held[x.shape[1]]


class InGlobal(Net):
    def table(self, x: Tensor) -> Any:
        if x.shape[1] not in TABLES:
            TABLES[x.shape[1]] = made(x.shape[1])
        return TABLES[x.shape[1]]


class InSlot(Net):
    def table(self, x: Tensor) -> Any:
        if self.slotted.table is None or len(self.slotted.table) != x.shape[1]:
            self.slotted.table = made(x.shape[1])
        return self.slotted.table


class InClosure(Net):
    def table(self, x: Tensor) -> Any:
        return self.remembered(x.shape[1])


class InNewAttribute(Net):
    def table(self, x: Tensor) -> Any:
        if not hasattr(self, "own") or len(self.own) != x.shape[1]:
            self.own = made(x.shape[1])
        return self.own


class InBuffer(Net):
    def table(self, x: Tensor) -> Any:
        if "grid" not in self._buffers or len(self.grid) != x.shape[1]:
            self.register_buffer("grid", made(x.shape[1]), persistent=False)
        return self.grid


class InBufferEveryTime(Net):
    def table(self, x: Tensor) -> Any:
        self.register_buffer("grid", made(x.shape[1]), persistent=False)
        return self.grid


class InFilledBuffer(Net):
    """Filled once, by the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.zeros(6, WIDTH))
        self.filled = False

    def table(self, x: Tensor) -> Any:
        if not self.filled:
            self.grid.copy_(made(6))
            self.filled = True
        return self.grid[: x.shape[1]]


CACHES = [
    InLruCache,
    InMethodCache,
    InDict,
    InGlobal,
    InSlot,
    InClosure,
    InNewAttribute,
    InBuffer,
    InBufferEveryTime,
    InFilledBuffer,
]


@pytest.fixture(autouse=True)
def empty() -> None:
    cached.cache_clear()
    TABLES.clear()
    torch.manual_seed(0)


def tokens(n: int = 6, batch: int = 3) -> Tensor:
    return torch.randn(batch, n, WIDTH, generator=torch.Generator().manual_seed(n))


def wanted(model: Net, x: Tensor) -> Tensor:
    """The same arithmetic with a table that nothing keeps."""
    plain = Net()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "grid"})
    out: Tensor = plain(x)
    return out


@pytest.mark.parametrize("kind", CACHES)
def test_a_model_with_a_cache_runs_right_after_explain(kind: type[Net]) -> None:
    model = kind().eval()
    assert len(rs_compile.explain(model, tokens()).rows) == 2
    out = model(tokens())
    assert not isinstance(out, FakeTensor)
    assert torch.equal(out, wanted(model, tokens()))


@pytest.mark.parametrize("kind", [k for k in CACHES if k is not InFilledBuffer])
def test_a_model_with_a_cache_is_optimized_at_several_sizes(kind: type[Net]) -> None:
    model = kind().eval()
    fast = rs_compile.optimize(model, {0: 1.0}, backend="eager")
    for n in (6, 9, 6):
        assert torch.equal(fast(tokens(n)), wanted(model, tokens(n)))
    assert torch.equal(model(tokens(6)), wanted(model, tokens(6)))


@pytest.mark.parametrize("kind", [k for k in CACHES if k not in (InBuffer, InBufferEveryTime, InFilledBuffer)])
def test_where_nothing_can_be_run_the_model_is_put_back_and_refused(kind: type[Net]) -> None:
    model = kind().train()
    with pytest.raises(rs_compile.CaptureError) as error:
        rs_compile.explain(model, tokens())
    assert "it keeps a value in " in str(error.value) and "which was empty" in str(error.value)
    assert "way out: call the model once on inputs of this size before, model(x)" in str(error.value)
    assert torch.equal(model(tokens()), wanted(model, tokens()))
    assert len(rs_compile.explain(model, tokens()).rows) == 2  # the way out


def test_a_place_is_named_as_code_reaches_it() -> None:
    model = nn.Sequential(InDict()).train()
    with pytest.raises(rs_compile.CaptureError, match=r"keeps a value in Sequential\.0\.held\[6\], which was empty"):
        rs_compile.explain(model, tokens())


def test_on_the_meta_device_the_model_is_put_back() -> None:
    model = InDict().to("meta").eval()
    rs_compile.plan(model, {0: 0.5}, tokens().to("meta"))
    assert model.held == {}


class Remembers(Net):
    """Adds what its last call left."""

    def table(self, x: Tensor) -> Any:
        before = self.held.get("mean", 0.0)
        self.held["mean"] = x.mean()
        return before


class RemembersBySteps(Net):
    def table(self, x: Tensor) -> Any:
        steps = self.held.setdefault("steps", [])
        steps.append(x.mean())
        return steps[-2] if len(steps) > 1 else 0.0


@pytest.mark.parametrize(("kind", "place"), [(Remembers, r"\['mean'\]"), (RemembersBySteps, r"\['steps'\]\[1\]")])
def test_a_model_that_reads_what_its_last_call_left_is_refused(kind: type[Net], place: str) -> None:
    model = kind().eval()
    match = rf"it reads what an earlier call of it left in {kind.__name__}\.held{place}, and writes there again"
    with pytest.raises(rs_compile.CaptureError, match=match) as error:
        rs_compile.optimize(model, {0: 0.5}, backend="eager")(tokens())
    assert "way out: pass that as an input and give it back as an output" in str(error.value)
    assert not isinstance(model(tokens()), FakeTensor)


class Shows(Net):
    """Leaves a value for who asks, and reads it never."""

    def table(self, x: Tensor) -> Any:
        self.shown = self.held["shown"] = x * 2
        return super().table(x)


def test_what_is_left_and_never_read_is_no_reason_to_refuse() -> None:
    model = Shows().eval()
    held = model.held
    assert torch.equal(rs_compile.optimize(model, {0: 1.0}, backend="eager")(tokens()), wanted(model, tokens()))
    assert model.held is held and model.shown is held["shown"]
    assert torch.equal(model.shown, 2 * tokens()[:2])  # of the two samples


class Unready:
    """What a lazy object may do before it is loaded."""

    __slots__ = ("table",)

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"{name} is not loaded yet")


class Gone:
    pass


UNREADY, GONE = Unready(), weakref.proxy(Gone())


class Names(Net):
    """Its code names objects that raise when they are looked at."""

    def table(self, x: Tensor) -> Any:
        return UNREADY and GONE if x.dim() == 0 else super().table(x)


def test_objects_that_cannot_be_looked_at_are_left_alone() -> None:
    model = Names().eval()
    assert torch.equal(rs_compile.optimize(model, {0: 1.0}, backend="eager")(tokens()), wanted(model, tokens()))


class Moves(Net):
    """A buffer that every call moves: by a step, or to another tensor."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.register_buffer("grid", torch.zeros(WIDTH))

    def table(self, x: Tensor) -> Any:
        now = self.grid.clone()
        if self.place == "in place":
            self.grid.copy_(x.detach().mean((0, 1)))
        else:
            self.grid = x.detach().mean((0, 1))
        return now


@pytest.mark.parametrize("place", ["in place", "another"])
def test_a_buffer_that_every_call_moves_is_moved_once(place: str) -> None:
    torch.manual_seed(0)
    model = Moves(place).eval()
    torch.manual_seed(0)
    twin = Moves(place).eval()
    fast = rs_compile.optimize(model, {0: 1.0}, backend="eager")
    for n in (6, 6, 9):
        assert torch.allclose(fast(tokens(n)), twin(tokens(n)), atol=1e-6)
        assert torch.allclose(model.grid, twin.grid, atol=1e-6)


class Hooks(Net):
    """Hooks a block when it is called first, as transformers does where hidden states are asked for."""

    def table(self, x: Tensor) -> Any:
        if not self.held:
            self.held["hooked"] = True
            self.blocks[0].register_forward_hook(lambda _, args, out: 2 * out)
        return super().table(x)


@pytest.mark.parametrize("training", [False, True])
def test_a_hook_of_the_models_own_is_there_once(training: bool) -> None:
    torch.manual_seed(0)
    model = Hooks().train(training)
    expected = copy.deepcopy(model)(tokens())
    assert torch.equal(rs_compile.optimize(model, {0: 1.0}, backend="eager")(tokens()), expected)
    assert len(model.blocks[0]._forward_hooks) == (not training)  # in eval mode it ran before it was captured
    assert torch.equal(model(tokens()), expected)
    assert len(model.blocks[0]._forward_hooks) == 1
