"""How many rows and columns leave a stage of a CNN, and how they are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

from passes.graph.base import ScheduleError
from passes.sites.choice import check_choice

Mode = Literal["line", "token"]
Order = Literal["together", "rows-first"]
Against = Literal["shortcut", "first-block", "sum"]


@dataclass(frozen=True)
class GridPrune:
    """What leaves after a stage (paper, section 3.3 and Table 6).

    Args:
        rows: how many rows of the [B, C, H, W] map leave.
        columns: how many columns leave.
        mode: "line" drops whole rows and columns by the means of the score map; "token" drops in each row its
            lowest `columns` tokens, then in each column of the compacted map its lowest `rows`.
        order: "together" scores rows and columns on the same map; "rows-first" scores the columns on the rows left.
            Only for mode "line".
        against: what the stage's output is compared with: the shortcut path at its own resolution, the first
            block's output, or the sum over the stage's blocks of each block's shift.

    Raises:
        ScheduleError: a value out of its range.
    """

    rows: int = 0
    columns: int = 0
    mode: Mode = "line"
    order: Order = "together"
    against: Against = "shortcut"

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            value: Any = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
                raise ScheduleError(f"{name} is {value!r}; write how many leave, an integer of at least 0")
            object.__setattr__(self, name, int(value))
        for name, allowed in (("mode", Mode), ("order", Order), ("against", Against)):
            check_choice(name, getattr(self, name), get_args(allowed))
