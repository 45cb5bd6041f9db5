"""Outputs that the caller does not want: what only they read is dead code."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from passes.graph.base import Pass, PassResult


@dataclass(frozen=True)
class KeepOutputs(Pass):
    """Gives None in the place of every other output.

    Args:
        kept: places of the flat outputs that stay.
    """

    kept: Collection[int]

    @property
    def changes_outputs(self) -> bool:
        return True

    def call(self, gm: GraphModule) -> PassResult:
        output = gm.graph.output_node()
        given: Any = output.args[0]
        leaves = tuple(leaf if i in self.kept else None for i, leaf in enumerate(given))
        output.args = (leaves,)
        return PassResult(gm, rewrites=sum(a is not b for a, b in zip(given, leaves, strict=True)))
