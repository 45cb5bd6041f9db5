"""What a plan depends on: every change of a model that its forward may read is seen, and reading is not a change."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from rs_compile.signature import StateReader, flatten, leaf_key


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)
        self.register_buffer("table", torch.zeros(3))
        self.scale, self.names, self.sizes = 0.5, ["a"], {"h": (2, 3)}
        self.config = SimpleNamespace(flags={"tanh": True}, depth=2)
        self.config_again = self.config
        self.window, self.pair = (7, (1, 2)), (1, ["x"])


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
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_change_is_seen(change: Callable[[Any], Any]) -> None:
    model = Model().eval()
    reader = StateReader(model)
    before = reader()
    assert reader() == before and hash(reader()) == hash(before)
    change(model)
    after = reader()
    assert after != before
    assert after == reader() == StateReader(model)(), "a fresh reader says the same"


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
