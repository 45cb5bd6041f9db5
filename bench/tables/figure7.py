"""Figure 7: representation shift of ResNet-50's stages."""

from __future__ import annotations

from bench.tables.pictures import Pictures
from rs_compile import Schedule

_figure = Pictures("resnet50", "0,1,2,3", Schedule())
add_arguments, run = _figure.add_arguments, _figure.run
