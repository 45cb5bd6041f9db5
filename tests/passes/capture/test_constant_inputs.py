"""Inputs that the model's Python code reads: what the graph holds of them, and what it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import sample, table
from torch import Tensor, nn

from passes.capture.capture import FIXED_BATCH, CaptureError, batched, capture
from passes.capture.constant_inputs import LARGEST, input_names, is_small

LENGTHS = torch.tensor([2, 4])


class Reads(nn.Module):
    """A function of x, an input whose values it reads, and a weight."""

    def __init__(self, f: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.f = f
        self.weight = nn.Parameter(table(8))

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        return self.f(x, lengths, self.weight)


def split(x: Tensor, lengths: Tensor, weight: Tensor) -> Tensor:
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    parts = torch.split(x, (starts[1:] - starts[:-1]).tolist(), dim=1)
    return torch.cat([part.mean(1, keepdim=True) * weight for part in parts], 1)


def windows(x: Tensor, lengths: Tensor, weight: Tensor) -> Tensor:
    at = torch.arange(x.shape[1]).reshape(2, -1)
    at = torch.nn.functional.pad(at, (0, int(lengths[0])), value=-1).flatten()
    return x[:, at[at >= 0].flip(0)] * weight


def noisy(x: Tensor, lengths: Tensor, weight: Tensor) -> Tensor:
    return x + torch.rand_like(lengths.float()).sum() * weight + torch.randn(8)


def rewritten(x: Tensor, lengths: Tensor, weight: Tensor) -> Tensor:
    mask = torch.ones(6, 1)
    first = x * mask
    mask[: lengths[0]] = 0
    return first + 10 * x * mask * weight


@pytest.mark.parametrize("f", [split, windows, rewritten])
def test_the_graph_has_the_value(f: Any) -> None:
    model, x = Reads(f), sample()
    gm = capture(model, (x, LENGTHS), {}, constant=(1,))
    assert torch.equal(gm(x, LENGTHS)[0], model(x, LENGTHS))
    assert torch.equal(gm(x, LENGTHS + 1)[0], model(x, LENGTHS))
    assert FIXED_BATCH.of(gm) == 3
    assert gm.get_parameter("weight") is model.weight


def test_the_models_line_is_the_graphs() -> None:
    gm = capture(Reads(split), (sample(), LENGTHS), {}, constant=(1,))
    mean = next(iter(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mean.dim)))
    assert "test_constant_inputs.py" in str(mean.stack_trace)


def test_random_numbers_are_drawn_when_it_runs() -> None:
    model, x = Reads(noisy), sample()
    gm = capture(model, (x, LENGTHS), {}, constant=(1,))
    torch.manual_seed(3)
    first = gm(x, LENGTHS)[0]
    torch.manual_seed(3)
    assert torch.equal(first, model(x, LENGTHS))
    assert not torch.equal(first, gm(x, LENGTHS)[0])


def fills(x: Tensor, lengths: Tensor, weight: Tensor) -> Tensor:
    out = torch.zeros(3, 6, 8)
    out[:, : lengths[1]] = x[:, : lengths[1]] * weight
    return out


def counts(x: Tensor, lengths: Tensor, weight: Tensor) -> Tensor:
    lengths += 1
    return x[:, : lengths[0]] * weight


@pytest.mark.parametrize(("f", "what"), [(fills, "aten.copy_.default writes"), (counts, "it writes")])
def test_writing_into_what_is_known_is_refused(f: Any, what: str) -> None:
    lengths = LENGTHS.clone()
    with pytest.raises(CaptureError) as error:
        capture(Reads(f), (sample(), lengths), {}, constant=(1,))
    lines = str(error.value).splitlines()
    assert lines[0] == f"torch.export cannot capture Reads: {what} into a value of its constant_inputs [RSC-202]"
    assert lines[-1] == "  way out: write that line out of place, or name fewer inputs in constant_inputs"
    assert f is counts or ("test_constant_inputs.py" in lines[1] and "in forward: return self.f(" in lines[1])
    assert torch.equal(lengths, LENGTHS)


def test_what_is_held_already_is_not_named_again() -> None:
    def sums(x: Tensor, lengths: Tensor, weight: Tensor) -> Tensor:
        return x if x.sum() > lengths.sum() else -x

    with pytest.raises(CaptureError) as error:
        capture(Reads(sums), (sample(), LENGTHS), {}, constant=(1,))
    assert str(error.value).splitlines()[-1].startswith("  way out: make that line independent of the data")
    with pytest.raises(CaptureError) as error:
        capture(Reads(sums), (sample(), LENGTHS), {})
    assert 'pass constant_inputs=("lengths",)' in str(error.value)


def test_names_of_inputs() -> None:
    model = Reads(split)
    assert input_names(model, (sample(), LENGTHS), {}) == [("x",), ("lengths",)]
    assert input_names(model, (sample(),), {"lengths": LENGTHS}) == [("x",), ("lengths",)]
    assert input_names(model, ({"a": 1, "b": [2, 3]},), {}) == [("x", "a"), ("x", "b"), ("x", "b")]


def test_small_whole_numbers_only() -> None:
    assert is_small(LENGTHS) and is_small(torch.tensor(True)) and is_small(torch.zeros(LARGEST, dtype=torch.int32))
    assert not any(map(is_small, (torch.zeros(2), torch.zeros(LARGEST + 1, dtype=torch.int64), [1, 2], None)))


def test_a_constant_says_nothing_of_samples() -> None:
    leaves = [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 2), torch.zeros(5), torch.zeros(2)]
    assert batched(leaves, {0}) == [False, True, True, False]
    assert batched(leaves, {0, 2}) == [False, True, False, False]
