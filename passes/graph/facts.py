"""What is known of a graph or of a node, under a typed name: no string keys elsewhere."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch.fx import GraphModule, Node

T = TypeVar("T")


class Fact(Generic[T]):
    """One thing known of a graph or of a node. Copies of a node hold what their original held.

    Args:
        name: unique among facts.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._key = f"rs_compile.{name}"

    def get(self, owner: GraphModule | Node) -> T | None:
        """The fact, or None where it is not known."""
        found: T | None = owner.meta.get(self._key)
        return found

    def of(self, owner: GraphModule | Node) -> T:
        """The fact.

        Raises:
            KeyError: it is not known.
        """
        found: T = owner.meta[self._key]
        return found

    def set(self, owner: GraphModule | Node, value: T) -> None:
        owner.meta[self._key] = value

    def drop(self, owner: GraphModule | Node) -> None:
        owner.meta.pop(self._key, None)
