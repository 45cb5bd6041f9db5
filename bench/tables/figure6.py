"""Figure 6: class attention beside representation shift of the MLP in DeiT-B."""

from __future__ import annotations

from bench.tables.pictures import Pictures
from rs_compile import Schedule

_figure = Pictures("deit_base_patch16_224", "1,5,9", Schedule())
add_arguments, run = _figure.add_arguments, _figure.run
