"""What a plan depends on: every change of a model that its forward may read is seen, and reading is not a change."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from rs_compile import state
from rs_compile.signature import flatten, leaf_key
from rs_compile.state import StateReader


class Act(nn.GELU):
    """A class of its own, to be changed."""

    gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Off(Act):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 4), Act(), nn.Linear(4, 2)
        self.register_buffer("table", torch.zeros(3))
        self.scale, self.names, self.sizes = 0.5, ["a"], {"h": (2, 3)}
        self.config = SimpleNamespace(flags={"tanh": True}, depth=2)
        self.config_again = self.config
        self.window, self.pair = (7, (1, 2)), (1, ["x"])
        self.dropped, self.empty, self.nothing, self.options = {1, 2}, SimpleNamespace(), {}, UserDict(a=1)
        self.count, self.zero = 1, 0.0
        self.drop, self.other_drop = nn.Dropout(0.1), nn.Dropout(0.1)


def replace_parameter(m: Any) -> None:
    m.first.weight = nn.Parameter(m.first.weight.detach().clone())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "train": lambda m: m.train(),
    "train of one layer": lambda m: m.last.train(),
    "another parameter": replace_parameter,
    "another dtype": lambda m: m.bfloat16(),
    "dtype of a buffer": lambda m: m._buffers.update(table=m.table.double()),
    "frozen": lambda m: m.first.weight.requires_grad_(False),
    "a number": lambda m: setattr(m, "scale", 0.25),
    "a new attribute": lambda m: setattr(m, "flag", True),
    "an attribute removed": lambda m: delattr(m, "scale"),
    "a list in place": lambda m: m.names.append("b"),
    "another tuple": lambda m: setattr(m, "window", (7, (1, 3))),
    "a list in a tuple": lambda m: m.pair[1].append("y"),
    "a dict in place": lambda m: m.sizes.update(h=(2, 4)),
    "a flag of a config": lambda m: m.config.flags.update(tanh=False),
    "another config": lambda m: setattr(m, "config_again", SimpleNamespace(depth=3)),
    "another layer": lambda m: setattr(m, "act", nn.ReLU()),
    "a layer more": lambda m: m.add_module("extra", nn.GELU()),
    "a bias less": lambda m: setattr(m.last, "bias", None),
    "a hook": lambda m: m.last.register_forward_hook(lambda *_: None),
    "a hook before": lambda m: m.last.register_forward_pre_hook(lambda *_: None),
    "a hook past the registry": lambda m: m.last._forward_hooks.update({-1: print}),
    "another size": lambda m: setattr(m.first.weight, "data", torch.ones(4, 1)),
    "another dtype of one": lambda m: setattr(m.last.bias, "data", torch.ones(2).double()),
    "true for one": lambda m: setattr(m, "count", True),
    "minus zero": lambda m: setattr(m, "zero", -0.0),
    "a set in place": lambda m: m.dropped.discard(2),
    "a flag of an object without any": lambda m: setattr(m.empty, "flag", True),
    "an entry of an empty dict": lambda m: m.nothing.update(flag=True),
    "an entry of another mapping": lambda m: m.options.update(a=2),
    "past setattr": lambda m: vars(m).update(scale=0.25),
    "another name": lambda m: vars(m).update(scaled=vars(m).pop("scale")),
    "a layer under another name": lambda m: m._modules.update(dropped_out=m._modules.pop("other_drop")),
    "a layer twice": lambda m: setattr(m, "other_drop", m.drop),
    "another table": lambda m: vars(m).update(_buffers={"table": torch.ones(5)}),
    "another class": lambda m: setattr(m.act, "__class__", Off),
    "its own forward": lambda m: setattr(m.act, "forward", torch.tanh),
}


@pytest.fixture(params=["versions", "entries"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways to see that nothing has changed; torch may lose what the first is made of."""
    if request.param == "entries":
        monkeypatch.setattr(state, "_dict_version", None)
        monkeypatch.setattr(state, "_tensor_guards", None)


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.usefixtures("reading")
def test_a_change_is_seen(change: Callable[[Any], Any]) -> None:
    model = Model().eval()
    reader = StateReader(model)
    before = reader()
    assert reader() == before and hash(reader()) == hash(before)
    change(model)
    after = reader()
    assert after != before
    assert after == reader() == StateReader(model)(), "a fresh reader says the same"


def no_forward(self: Any, x: Tensor) -> Tensor:
    return x


CODE: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "forward": lambda patch: patch.setattr(Act, "forward", no_forward),
    "forward of a base": lambda patch: patch.setattr(nn.GELU, "forward", no_forward),
    "a method that was inherited": lambda patch: patch.setattr(Act, "extra_repr", lambda self: "", raising=False),
    "call": lambda patch: patch.setattr(nn.Module, "__call__", no_forward),
    "a flag": lambda patch: patch.setattr(Act, "gain", 2.0),
    "code in place": lambda patch: patch.setattr(Off.forward, "__code__", no_forward.__code__),
}


@pytest.mark.parametrize("change", CODE.values(), ids=list(CODE))
@pytest.mark.usefixtures("reading")
def test_code_of_a_class_deep_inside_is_seen(change: Callable[[pytest.MonkeyPatch], None]) -> None:
    model: Any = nn.Sequential(nn.Sequential(Model()))
    model[0][0].other_act = Off()
    reader = StateReader(model)
    before = reader()
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        after = reader()
        assert after != before
        assert after == reader() == StateReader(model)()
    assert reader() == before, "and put back"


def test_another_hook_in_the_memory_of_the_first_is_another() -> None:
    """A key that holds addresses would take the second for the first, whose memory it is given."""
    model = Model()
    reader, seen = StateReader(model), []
    for _ in range(20):
        hook = model.act.register_forward_hook(lambda *_: None)
        seen.append(reader())
        hook.remove()
        del hook
        reader()
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


def test_equal_states_are_one_object() -> None:
    """A plan's key then compares at once, at every call."""
    model = Model()
    reader = StateReader(model)
    train, evaluated = reader(), None
    for _ in range(3):
        evaluated = evaluated or (model.eval() and reader())
        assert (model.train() and reader()) is train
        assert (model.eval() and reader()) is evaluated
    with torch.inference_mode():
        assert reader() is evaluated
        model.first.weight.requires_grad_(False)
        assert reader() != evaluated, "though gradients are off"


@pytest.mark.usefixtures("reading")
def test_values_are_no_change() -> None:
    """Training, loading and moving a value back and forth."""
    model = Model().eval()
    reader = StateReader(model)
    before = reader()
    with torch.no_grad():
        model.first.weight.mul_(2)
        model.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})
    model.first.weight.grad = torch.ones(4, 4)
    model.scale, model.scale = 0.7, 0.5
    model.train()
    hook = model.first.register_forward_hook(lambda *_: None)
    assert reader() != before
    model.eval()
    hook.remove()
    assert reader() == before


def test_autocast_is_read_every_time() -> None:
    reader = StateReader(Model())
    outside = reader()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = reader()
    assert outside == reader() != inside


def test_the_identities_are_those_of_parameters_and_buffers() -> None:
    model = Model()
    reader = StateReader(model)
    assert sorted(reader().identities) == sorted(map(id, (*model.parameters(), *model.buffers())))


def test_flatten_knows_mappings_inside_containers() -> None:
    class Inputs(dict[str, Any]):
        pass

    a, b = torch.ones(1), torch.zeros(2)
    leaves, spec = flatten(([Inputs(x=a, y=[b, 3])],), {"z": Inputs(x=b)})
    assert [type(leaf) for leaf in leaves] == [torch.Tensor, torch.Tensor, int, torch.Tensor]
    args, kwargs = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert type(args[0][0]) is type(kwargs["z"]) is Inputs
    assert args[0][0]["y"][0] is b
    assert flatten(([Inputs(x=a, y=[b, 3])],), {"z": Inputs(x=b)})[1] == spec
    assert flatten(([Inputs(x=a, w=[b, 3])],), {"z": Inputs(x=b)})[1] != spec


def test_a_constant_leaf_is_known_by_its_value() -> None:
    x, grid = torch.zeros(6, 4), torch.tensor([[1, 2, 3]])
    assert leaf_key([x, grid], (1,)) == leaf_key([x, grid.clone()], (1,))
    assert leaf_key([x, grid], (1,)) != leaf_key([x, grid + 1], (1,))
    assert leaf_key([x, grid]) == leaf_key([x, grid + 1])


def test_many_samples_on_a_gpu_are_another_signature() -> None:
    """There tokens are selected another way; on a CPU the number of samples never counts."""

    def key(samples: int, device: str) -> object:
        with FakeTensorMode():
            return leaf_key([torch.empty(samples, 3, 8, 8, device=device)])

    assert key(1, "cuda") == key(256, "cuda") != key(257, "cuda") == key(1024, "cuda")
    assert key(1, "cpu") == key(1024, "cpu")
