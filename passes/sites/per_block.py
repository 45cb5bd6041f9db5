"""Values by block, as a schedule holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class PerBlock(Mapping[int, Any]):
    """An immutable, hashable, picklable mapping of block index to a value, in block order."""

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Iterable[tuple[int, Any]] = ()) -> None:
        self._pairs = tuple(sorted(pairs, key=lambda pair: pair[0]))

    def __getitem__(self, block: int) -> Any:
        return dict(self._pairs)[block]

    def __iter__(self) -> Iterator[int]:
        return (block for block, _ in self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __hash__(self) -> int:
        return hash(self._pairs)

    def __repr__(self) -> str:
        return repr(dict(self._pairs))
