"""Behind a cut the graph is the model on the smaller map, or the first call refuses: what code computes from sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import oracle_cnn
import pytest
import torch
from oracle_cnn import Cut
from torch import Tensor, nn
from torch.nn import functional as F

import rs_compile
from rs_compile import GridPrune, Refusal, Schedule

LINES = Cut(4, 3)
Head = Callable[["Net", Tensor, Tensor], Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + x)


class Net(nn.Module):
    """One stage of 12 x 9 cells; `head(model, before, after)` is what it returns."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one = nn.Sequential(Block(), Block())
        self.wide = nn.Conv2d(4, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 4, 3, 2, 1)
        self.head = head

    def forward(self, x: Tensor) -> Any:
        before = self.stem(x)
        return self.head(self, before, self.one(before))


def images() -> Tensor:
    return torch.randn(2, 3, 12, 9, generator=torch.Generator().manual_seed(0))


def run(head: Head, cut: Cut = LINES, **options: Any) -> tuple[Any, rs_compile.OptimizedModel]:
    handle = rs_compile.optimize(
        Net(head).eval(), Schedule(grid={0: GridPrune(**vars(cut))}), **{"backend": "eager", **options}
    )
    with torch.no_grad():
        return handle(images()), handle


@torch.no_grad()
def by_hand(head: Head, cut: Cut = LINES) -> Any:
    model = Net(head).eval()
    before = model.stem(images())
    after = model.one(before)
    return head(model, before, oracle_cnn.cut_map(after, oracle_cnn.distance(after, before), cut)[0])


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def coordinates(x: Tensor) -> Tensor:
    """[B, 1, H, W], from -1 to 1 along rows."""
    return torch.linspace(-1, 1, x.shape[2])[:, None].expand(len(x), 1, *x.shape[2:])


def stretched(x: Tensor) -> Tensor:
    """Its mean in every cell."""
    return F.interpolate(F.adaptive_avg_pool2d(x, 1), size=x.shape[2:], mode="nearest")


SIZES: dict[str, Head] = {
    "a kernel": lambda m, x, a: mean(F.max_pool2d(a, (a.shape[2] // 2, a.shape[3] // 3))),
    "coordinates": lambda m, x, a: mean(m.wide(torch.cat([a[:, :3], coordinates(a)], 1))),
    "a divisor": lambda m, x, a: mean(a) / a.shape[2],
    "what a border counts": lambda m, x, a: mean(
        m.wide(a) / F.conv2d(torch.ones(1, 1, *a.shape[2:]), torch.ones(1, 1, 3, 3), padding=1)
    ),
    "a mean as a map, convolved": lambda m, x, a: mean(F.relu(a + m.wide(stretched(a)))),
    "the path that it takes": lambda m, x, a: mean(m.wide(a) if a.shape[2] > 10 else a.tanh()),
    "padding that this size does not need": lambda m, x, a: mean(
        m.down(a if a.shape[2] % 8 == 4 else F.pad(a, [1] * 4))
    ),
    "of a map among the outputs": lambda m, x, a: [m.wide(a) * a.shape[2]],
}


@pytest.mark.parametrize("name", SIZES)
def test_what_code_computes_from_the_size_of_a_map_is_refused(name: str) -> None:
    with pytest.raises(Refusal, match="the model itself does something else on the smaller map: output 0") as e:
        run(SIZES[name])
    assert "fixed number here" in str(e.value) and "way out: cut a later stage" in str(e.value)


def test_what_is_refused_would_have_been_wrong() -> None:
    head = SIZES["a kernel"]
    assert not torch.allclose(run(head, verify=False)[0], by_hand(head), rtol=1e-2)


def test_the_refusal_names_the_first_layer_that_differs() -> None:
    with pytest.raises(Refusal) as e:
        run(lambda m, x, a: mean(m.down(m.wide(a) / a.shape[2])))
    assert str(e.value).startswith("aten.conv2d.default (conv2d_6)") and "up to conv2d_5 they agree" in str(e.value)
    assert "test_grid_faithful.py" in str(e.value)


SAME: dict[str, Head] = {
    "pooled": lambda m, x, a: mean(m.wide(a)),
    "every cell its own divisor": lambda m, x, a: mean(a / torch.ones_like(a).sum(1, keepdim=True)),
    "in place": lambda m, x, a: mean(m.wide(m.wide(a).mul_(2))),
    "maps": lambda m, x, a: {"own": a, "later": m.down(a), "cell by cell": a.tanh(), "pooled": (mean(a), 3)},
    "a map from before": lambda m, x, a: mean(m.wide(a) * x),
    "a mean as a map": lambda m, x, a: mean(m.wide(torch.cat([a[:, :2], stretched(a)[:, :2]], 1))),
}


@pytest.mark.parametrize("name", SAME)
def test_what_is_the_same_is_taken(name: str) -> None:
    cut = Cut(4, 3, "token")
    got, handle = run(SAME[name], cut)
    assert handle.report().skips == ()
    if isinstance(got, Tensor) and name != "a map from before":
        oracle.assert_close(got, by_hand(SAME[name], cut), 1e-5)


def skip(handle: rs_compile.OptimizedModel) -> str:
    (reason,) = (s.reason for s in handle.report().skips if s.node == "graph")
    return reason


def test_a_model_that_does_not_run_on_the_smaller_map_is_not_compared() -> None:
    def head(m: Net, x: Tensor, a: Tensor) -> Tensor:
        assert a.shape[2] == 12, "made for 12 rows"
        return mean(a)

    got, handle = run(head)
    assert got.shape == (2, 4)
    assert skip(handle).endswith("on the smaller map: on it the model raises AssertionError: made for 12 rows")


def test_random_numbers_are_not_compared() -> None:
    _, handle = run(lambda m, x, a: mean(a + torch.rand_like(a)))
    assert skip(handle) == "not compared with the model on the smaller map: the model draws random numbers"


@torch.no_grad()
def test_a_map_that_the_model_writes_without_returning_it_is_not_compared() -> None:
    class Writes(Block):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.branch(x)
            out += x
            F.relu(out, inplace=True)
            return out

    model = Net(lambda m, x, a: mean(m.wide(a))).eval()
    model.one[1] = Writes().eval()
    handle = rs_compile.optimize(model, Schedule(grid={0: GridPrune(4, 3)}), backend="eager")
    assert handle(images()).shape == (2, 4)
    assert skip(handle).endswith("what the model reads is not what its function returns")


@torch.no_grad()
def test_two_cuts_are_followed_one_after_the_other() -> None:
    class Two(Net):
        def __init__(self, divisor: Callable[[Tensor], int]) -> None:
            super().__init__(lambda m, x, a: a)
            self.two, self.divisor = nn.Sequential(Block(), Block()), divisor

        def forward(self, x: Tensor) -> Tensor:
            later = self.two(self.down(super().forward(x)))
            return mean(self.wide(later)) / self.divisor(later)

    schedule = Schedule(grid={0: GridPrune(4, 2), 1: GridPrune(1, 1, "token")})
    handle = rs_compile.optimize(Two(lambda x: 2).eval(), schedule, backend="eager")
    assert handle(images()).shape == (2, 4) and handle.report().skips == ()
    with pytest.raises(Refusal, match="the model itself does something else on the smaller map"):
        rs_compile.optimize(Two(lambda x: x.shape[2]).eval(), schedule, backend="eager")(images())


def test_a_plan_runs_nothing_behind_a_cut() -> None:
    model = Net(SIZES["a divisor"]).eval()
    assert rs_compile.plan(model, Schedule(grid={0: GridPrune(4, 3)}), images()).skips == ()
