"""What the model writes in place: seen by everybody who reads that memory, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import C, N, axis_from_input, graph_of, on_short_input, sample, table
from torch import Tensor

from passes.graph.base import Refusal


def test_writing_into_tokens_refuses() -> None:
    gm = graph_of(lambda x: x.mul(2).relu_())
    with pytest.raises(Refusal) as refusal:
        axis_from_input(gm)
    assert refusal.value.reason == "writes in place into a value that runs over tokens"
    assert refusal.value.way_out == "write the op out of place"


def one_token(x: Tensor, at: int) -> Tensor:
    y = x * 1
    y[:, at] = 0.0
    return y


def table_between(x: Tensor, table: Tensor) -> Tensor:
    own = table * 1
    y = x + own
    own[1:] *= 2
    return y * own


def weights_between(x: Tensor, table: Tensor) -> Tensor:
    own = (table * x.new_ones(x.shape[0], 1, 1)).clone()
    own[:, 1:] *= 2
    return x * own.softmax(1)


@pytest.mark.parametrize(
    ("op", "tables", "prefix"),
    [
        pytest.param(lambda x: one_token(x, 3), (), 0, id="a token that may go"),
        pytest.param(lambda x: one_token(x, 0), (), 1, id="a token that stays"),
        pytest.param(lambda x: one_token(torch.zeros_like(x), 0) + x, (), 1, id="zeros like the tokens"),
        pytest.param(table_between, (table(N, C),), 0, id="a table that was gathered"),
        pytest.param(weights_between, (table(N, C),), 0, id="what a softmax over tokens reads"),
    ],
)
def test_writing_through_a_view_refuses(op: Any, tables: tuple[Tensor, ...], prefix: int) -> None:
    """The compact twin, the gathered table and the value at full length have memory of their own."""
    gm = graph_of(op, tables=tables)
    with pytest.raises(Refusal, match="writes in place into a value that runs over tokens"):
        axis_from_input(gm, prefix)


def test_a_table_may_be_written_before_it_is_read() -> None:
    def built(x: Tensor, values: Tensor) -> Tensor:
        own = x.new_zeros(N, C)
        own[2:] = values[2:]
        return x * own

    values = table(N, C)
    (short,), index = on_short_input(graph_of(built, tables=(values,)), sample())
    values[:2] = 0
    torch.testing.assert_close(short, torch.stack([sample()[b, kept] * values[kept] for b, kept in enumerate(index)]))


def test_what_needs_every_token_reaches_the_network_through_memory() -> None:
    def network(x: Tensor) -> Tensor:
        own = x.new_zeros(1)
        own[0] = x.std()
        return x + own * 2

    with pytest.raises(Refusal, match="runs over the samples of the batch, and later layers depend on it"):
        axis_from_input(graph_of(network))
