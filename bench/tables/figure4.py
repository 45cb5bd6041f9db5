"""Figure 4: representation shift of the attention layer over pictures."""

from __future__ import annotations

from bench.tables.pictures import Pictures
from rs_compile import Schedule, Shift

_figure = Pictures("deit_base_patch16_224", "1,5,9", Schedule(score=Shift(of="attention")))
add_arguments, run = _figure.add_arguments, _figure.run
