"""Side inputs that a softmax over tokens made: normalised over the tokens that are left, or refused."""

from __future__ import annotations

import pytest
import torch
from graphs import C, N, axis_from_input, graph_of, leaves, on_short_input, refusals, sample, table
from torch import Tensor

from passes.token_axis import analyse, stream_layout


def mixed(x: Tensor, positions: Tensor) -> Tensor:
    """Attention by content and by position, half and half, as ConViT mixes them."""
    content = (x @ x.transpose(1, 2)).softmax(-1)
    place = positions.expand(x.shape[0], -1, -1).softmax(-1)
    weights = 0.5 * content + 0.5 * place
    return weights / weights.sum(-1, keepdim=True) @ x


def test_positions_are_normalised_over_the_tokens_that_are_left() -> None:
    positions = 3 * table(N, N)
    (short,), index = on_short_input(graph_of(mixed, tables=(positions,)), sample())
    for b, kept in enumerate(index):
        x = sample()[b, kept][None]
        torch.testing.assert_close(short[b], mixed(x, positions[kept][:, kept][None])[0])


def test_weights_gathered_as_they_are_would_be_another_result() -> None:
    """The oracle above could not tell if gathered weights happened to sum to one."""
    positions = 3 * table(N, N)
    _, index = on_short_input(graph_of(mixed, tables=(positions,)), sample())
    kept = index[0]
    gathered = positions.softmax(-1)[kept][:, kept].sum(-1)
    assert gathered.min() < 0.9


def test_both_sources_are_named_by_the_analysis() -> None:
    axis = axis_from_input(graph_of(mixed, tables=(table(N, N),)))
    assert [n.target for n in axis.sources] == [torch.ops.aten.expand.default]
    assert not refusals(axis)


def test_a_softmax_over_channels_is_no_such_thing() -> None:
    axis = axis_from_input(graph_of(lambda x, t: x + t.softmax(-1), tables=(table(N, C),)))
    assert not axis.sources and not refusals(axis)


def test_weights_from_before_the_tokens_leave_are_refused() -> None:
    def early(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        place = y.softmax(-1)
        z = x * 2
        return place, (z @ z.transpose(1, 2)).softmax(-1) * 0.5 + place * 0.5

    gm = graph_of(early, sample(), sample(N, N))
    start = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    layout, batch = stream_layout(start)
    axis = analyse(gm, start, layout, batch)
    assert refusals(axis) == ["meets weights that were normalised over tokens before some of them leave"]
    assert leaves(gm)[1] not in axis.layouts


@pytest.mark.parametrize("keep", [2, 5])
def test_every_count_of_tokens(keep: int) -> None:
    positions = table(N, N)
    (short,), index = on_short_input(graph_of(mixed, tables=(positions,)), sample(), keep=keep)
    x = sample()[1, index[1]][None]
    torch.testing.assert_close(short[1], mixed(x, positions[index[1]][:, index[1]][None])[0])
