"""Each pass is held to its shapes: the whole graph runs on fake tensors behind it, from its inputs on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from passes.graph.base import OBSERVER, Pass, PassResult
from passes.graph.verify import no_stale_shapes


def _verify(pass_: Pass, result: PassResult) -> None:
    if not pass_.leaves_dead_code:
        no_stale_shapes(result.gm)


@pytest.fixture(autouse=True)
def verified() -> Iterator[None]:
    token = OBSERVER.set(_verify)
    yield
    OBSERVER.reset(token)
