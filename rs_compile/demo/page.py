"""The demo as one self-contained page."""

from __future__ import annotations

import base64

from rs_compile.demo.result import Demo
from rs_compile.pages import render


def page(demo: Demo, png: bytes) -> str:
    """HTML with the tables, what they show, and three pictures.

    Args:
        png: the pictures, see `rs_compile.demo.figure`.
    """
    tables = [(title, *cells) for title, cells in demo.tables()]
    return render("demo.html", tables=tables, notes=demo.notes(), png=base64.b64encode(png).decode())
