"""A row of a search's table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rs_compile.schedule import Schedule
from rs_compile.timing import Spread


@dataclass(frozen=True)
class Row:
    """One schedule that was tried.

    Args:
        method, shape: how tokens leave, and how they are spread over the blocks.
        schedule: as `optimize` takes it.
        macs: multiply-accumulates of one picture, on the rewritten graph; 0 where it is refused.
        drift, error: mean and standard error on the pictures searched on; None where it did not run.
        agreement: share of these with the dense model's best class.
        held_drift, held_error, held_agreement: the same on the held-out ones; of the best of each method alone.
        speedup: over torch.compile(model), of finalists alone.
        refused: why it was not run, "" where it was.
        draws: of random selection, drift is the mean over so many.
    """

    method: str
    shape: str
    schedule: Schedule
    macs: int
    drift: float | None = None
    error: float | None = None
    agreement: float | None = None
    held_drift: float | None = None
    held_error: float | None = None
    held_agreement: float | None = None
    speedup: Spread | None = None
    refused: str = ""
    draws: int = 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        speedup = self.speedup.to_dict() if self.speedup is not None else None
        return values | {"schedule": json.loads(self.schedule.to_json()), "speedup": speedup}
