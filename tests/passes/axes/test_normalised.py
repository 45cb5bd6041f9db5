"""Side inputs that a softmax over tokens made: normalised over the tokens that are left, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import C, N, axis_from_input, graph_of, leave_at_input, leaves, on_short_input, refusals, sample, table
from torch import Tensor

from passes.axes.token_axis import analyse, stream_layout
from passes.sites.restore import RestoreTokens
from passes.sites.retarget import RetargetTokens


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


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Weights made and weighed in another layout than the one that they are met in."""
    place = positions.mT.expand(x.shape[0], -1, -1).softmax(1) * positions.mT.sigmoid()
    content = (x @ x.transpose(1, 2)).softmax(-1)
    return (content + place.transpose(1, 2).unsqueeze(1).flatten(0, 1)) @ x


def one_each(x: Tensor, positions: Tensor) -> Tensor:
    """A weight for each token, of a size of one along the channels."""
    return x * positions.expand(x.shape[0], -1).softmax(-1).unsqueeze(-1)


@pytest.mark.parametrize(("network", "sizes"), [(turned, (N, N)), (one_each, (N,))])
def test_views_lie_between(network: Callable[..., Tensor], sizes: tuple[int, ...]) -> None:
    positions = 3 * table(*sizes)
    (short,), index = on_short_input(graph_of(network, tables=(positions,)), sample())
    for b, kept in enumerate(index):
        left = positions[kept] if len(sizes) == 1 else positions[kept][:, kept]
        torch.testing.assert_close(short[b], network(sample()[b, kept][None], left)[0])


def test_weights_without_samples_are_refused() -> None:
    """Each sample keeps tokens of its own, over which they would be normalised."""
    gm = graph_of(lambda x, t: x * (t * x.new_ones(1)).softmax(0).mT.mT, tables=(table(N, 1),))
    assert refusals(axis_from_input(gm)) == ["meets weights, normalised over tokens, that are the same for all samples"]


def test_who_else_reads_what_the_softmax_reads_has_every_token() -> None:
    def both(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        place = positions.expand(x.shape[0], -1)
        return (x * place.softmax(-1).unsqueeze(-1)).mean(1), place.sort(-1).values

    gm = graph_of(both, tables=(table(N),))
    leave_at_input(gm, 4)
    wanted = both(sample(), table(N))[1]
    got = RestoreTokens()(RetargetTokens()(gm).gm).gm(sample())[1]
    torch.testing.assert_close(got, wanted)
