"""The demo as one self-contained page."""

from __future__ import annotations

import base64
from html import escape

from rs_compile.demo.result import Demo

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; height: auto; background: white; }
div { overflow-x: auto; }
h2 { font-size: 1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8886; }
th:first-child, td:first-child { text-align: left; }
"""


def page(demo: Demo, png: bytes) -> str:
    """HTML with the table, what it shows, and three pictures.

    Args:
        png: the pictures, see `rs_compile.demo.figure`.
    """
    tables = "".join(f"<h2>{escape(title)}</h2>{_table(title, *cells)}" for title, cells in demo.tables())
    notes = "".join(f"<p>{escape(note)}.</p>" for note in demo.notes())
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>rs-compile demo</title>
<style>{_STYLE}</style>
<h1>rs-compile demo</h1>
{tables}
{notes}
<h2>Which tokens stay</h2>
<p>Three of the pictures, how much the first block's MLP changes each patch, and the patches that are left.</p>
<img alt="For each of three pictures the score of every patch, and the patches that are left after each block"
src="data:image/png;base64,{base64.b64encode(png).decode()}">
</html>
"""


def _table(title: str, heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(text)}</td>" for text in rest)}</tr>'
        for first, *rest in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div tabindex="0" role="region" aria-label="{escape(title)}">{table}</div>'
