"""One process per device, as `torchrun` starts them; a process that was started by hand is the only one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")
_PATIENCE = timedelta(days=1)  # the others wait at the end for the slowest share


@dataclass(frozen=True)
class Ranks:
    """This process among those of the evaluation.

    Args:
        rank, world: which one of how many.
        local: which one on this machine; it takes the device of that number.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def join(cls) -> Ranks:
        """Meets the other processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), once a process."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        if not distributed.is_initialized():
            # only sums and small objects are exchanged, so gloo does for CPU and GPUs alike
            distributed.init_process_group("gloo", timeout=_PATIENCE)
        return cls(distributed.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def first(self) -> bool:
        """Whether this process is the one that reads resume files and prints."""
        return self.rank == 0

    def device(self, device: torch.device | str) -> torch.device:
        """`device`; where it has no number and there are several processes, the one of this process."""
        device = torch.device(device)
        alone = self.world == 1 or device.type == "cpu" or device.index is not None
        return device if alone else torch.device(device.type, self.local)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every world-th of `items`, from this rank's on."""
        return items[self.rank :: self.world]

    def broadcast(self, value: Any) -> Any:
        """What the first process passes here."""
        if self.world == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What all processes pass here, in the order of their ranks; every process gets it."""
        if self.world == 1:
            return [value]
        boxes: list[Any] = [None] * self.world
        distributed.all_gather_object(boxes, value)
        return boxes
