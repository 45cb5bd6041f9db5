"""What may share memory with what: asking must not change what is known of the graph."""

from __future__ import annotations

import torch
from graphs import first_input, graph_of

from passes.graph.aliasing import Memory
from passes.graph.layout import expr


def test_the_batch_stays_symbolic():
    """Interpolation, a composite op, is replayed on fake values, and its own code fixes every size."""
    gm = graph_of(lambda x: torch.nn.functional.interpolate(x, scale_factor=2))
    Memory(gm.graph)
    assert not expr(first_input(gm).meta["val"].shape[0]).is_Integer
