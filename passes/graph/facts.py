"""What is known of a graph or a node beside its ops: typed entries of `meta`, one accessor for each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch.fx import GraphModule, Node

T = TypeVar("T")


@dataclass(frozen=True)
class Fact(Generic[T]):
    """A kind of fact. The room that knows its type declares it; nothing else says its name.

    Facts lie in `meta`, so they go where torch copies a graph or a node, and are shared by the copies.

    Args:
        name: the key in `meta`.
    """

    name: str

    def of(self, owner: GraphModule | Node) -> T:
        """The fact; a KeyError where it is not known."""
        value: T = owner.meta[self.name]
        return value

    def get(self, owner: GraphModule | Node) -> T | None:
        """The fact, or None where it is not known."""
        value: T | None = owner.meta.get(self.name)
        return value

    def known(self, owner: GraphModule | Node) -> bool:
        """Whether it is known."""
        return self.name in owner.meta

    def put(self, owner: GraphModule | Node, value: T) -> None:
        """Notes it, or notes it anew."""
        owner.meta[self.name] = value

    def first(self, owner: GraphModule | Node, value: T) -> T:
        """The fact; where it is not known, `value` from now on."""
        found: T = owner.meta.setdefault(self.name, value)
        return found

    def forget(self, owner: GraphModule | Node) -> None:
        """Holds it no longer, if it did."""
        owner.meta.pop(self.name, None)

    def take(self, owner: GraphModule | Node) -> T:
        """The fact, which is held no longer; a KeyError where it is not known."""
        value: T = owner.meta.pop(self.name)
        return value
