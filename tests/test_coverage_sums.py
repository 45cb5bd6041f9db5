"""The oracle's residual sums: what was added to which stream, however the model writes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.coverage.sums import NoSum, Sums


class Following(TorchDispatchMode):
    def __init__(self, sums: Sums) -> None:
        super().__init__()
        self.sums = sums

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.sums.run(func, args, kwargs or {})


def attention(x: Tensor) -> Tensor:
    return x.flip(1) * 2


def mlp(x: Tensor) -> Tensor:
    return x.square() - 1


def after(x: Tensor) -> Tensor:
    return x + attention(x)


def one_after_the_other(x: Tensor) -> Tensor:
    x = after(x)
    return mlp(x) + x


def in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x += attention(x)
    x += mlp(x)
    return x


def through_views(x: Tensor) -> Tensor:
    x = after(x)
    return x + mlp(x.flatten(0, 1)).view(x.shape)


def parallel(x: Tensor) -> Tensor:
    return x + attention(x) + mlp(x)


def parallel_in_place(x: Tensor) -> Tensor:
    branch = mlp(x)
    x = x.clone()
    x += attention(x)
    x += branch
    return x


def joined(x: Tensor) -> Tensor:
    """Both branches in one, scaled, as timm's ParallelScalingBlock."""
    return x + 0.5 * (attention(x) + mlp(x))


def weighed(x: Tensor) -> Tensor:
    x = after(x)
    return 0.5 * x + mlp(x)


def normed(x: Tensor) -> Tensor:
    return one_after_the_other(x).softmax(-1)


def followed(layer: Any) -> tuple[Tensor, Tensor, Sums]:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    given, sums = x.clone(), Sums()
    sums.begin(given)
    with torch.no_grad(), Following(sums):
        return x, layer(given), sums


def post_norm(x: Tensor) -> Tensor:
    x = after(x).softmax(-1)
    return x + mlp(x)


def into_its_input(x: Tensor) -> Tensor:
    x += attention(x)
    x += mlp(x)
    return x


@pytest.mark.parametrize("layer", [one_after_the_other, in_place, into_its_input, through_views, post_norm])
def test_the_last_branch_and_its_stream(layer: Any) -> None:
    x, out, sums = followed(layer)
    stream, term = sums.of(out)
    wanted = after(x).softmax(-1) if layer is post_norm else after(x)
    torch.testing.assert_close(stream, wanted)
    torch.testing.assert_close(term, mlp(wanted))


@pytest.mark.parametrize("layer", [parallel, parallel_in_place, joined, weighed, normed])
def test_nothing_is_guessed(layer: Any) -> None:
    """A branch that reads an earlier stream, two branches in one, a sum that weighs its stream."""
    _, out, sums = followed(layer)
    with pytest.raises(NoSum):
        sums.of(out)
