"""The picture of the README: two blocks before and after the pass, narrow enough for a phone."""

from __future__ import annotations

WIDTH, HEIGHT = 420, 492
COLUMNS = {"before": 16, "after": 222}  # where each begins
ROOM, INSIDE = 182, 38  # width of a column; where its boxes begin, beside the stream
SCORES = (1.0, 0.75, 0.3, 0.2, 0.9, 0.6, 0.35, 0.8, 0.65, 0.25)  # a token each; those below a half leave
SQUARE, STEP = 13, 18.5
TITLE = "Two blocks before and after the pass"
_STYLE = """\
.card{fill:#fbfbfc;stroke:#8a929c}text{font:13px ui-sans-serif,system-ui,sans-serif;fill:#1f2328}
.head{font-weight:700;font-size:15px}.soft{fill:#57606a}.mid{text-anchor:middle}
.box{fill:#fff;stroke:#8a929c}.site{fill:#fdf0e0;stroke:#d2791e}.line{fill:none;stroke-width:2.2}
.thin{fill:none;stroke:#8a929c;stroke-width:1.6}.all{stroke:#5b7fb4}.kept{stroke:#d2791e}
.plus{fill:#fbfbfc;stroke-width:1.8}rect.all{fill:#5b7fb4}rect.kept{fill:#d2791e}
rect.gone{fill:none;stroke:#8a929c;stroke-dasharray:3 2}
@media(prefers-color-scheme:dark){.card{fill:#1f242c;stroke:#6b7480}.plus{fill:#1f242c}text{fill:#e6e9ee}
.soft{fill:#aab3be}.box{fill:#2a313b;stroke:#6b7480}.site{fill:#42301c}}"""


def overview() -> str:
    """As an SVG file."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{TITLE}"><style>{_STYLE}</style>',
        f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
    ]
    for name, x in COLUMNS.items():
        after = name == "after"
        kind = "kept" if after else "all"
        parts += [_text(x, 28, name, "head"), *_tokens(x, 42, False)]
        parts += [_line(f"M{x + 12},58V{268 if after else 300}", "all"), *_block(x, 80, "block i", "attention", "all")]
        parts += _site(x) if after else [_text(x + INSIDE, 222, "all N tokens go on"), *_tokens(x, 304, False)]
        parts += [_line(f"M{x + 12},320V456m-5,-6l5,6l5,-6", kind)]
        parts += _block(x, 342, "block i + 1", "flash attention" if after else "attention", kind)
        parts += [_text(x, 477, "K &lt; N tokens from here on" if after else "N tokens, everywhere")]
    return "\n".join([*parts, "</svg>\n"])


def _block(x: int, y: int, name: str, attention: str, kind: str) -> list[str]:
    """Two branches beside the stream, each added to it."""
    parts = [_text(x + INSIDE, y, name)]
    for at, branch in ((y + 22, attention), (y + 72, "MLP")):
        stream, middle = x + 12, x + INSIDE + 60
        parts += [
            _line(f"M{stream},{at}H{x + INSIDE}", kind),
            _line(f"M{middle},{at + 13}V{at + 24}H{stream}", kind),
            *_box(x + INSIDE, at - 13, branch),
            f'<circle class="plus {kind}" cx="{stream}" cy="{at + 24}" r="6.5"/>',
            _line(f"M{stream - 3.5},{at + 24}h7m-3.5,-3.5v7", kind),
        ]
    return parts


def _site(x: int) -> list[str]:
    """Score, top-k and gather, and the tokens that are left."""
    down, bars = x + 150, x + INSIDE + 52
    parts = [
        f'<path class="thin" d="M{down},165V200M{down},226V234M{down},260V268"/>',
        *_box(x + INSIDE, 200, "score ‖MLP(x) − x‖", "site"),
        *_box(x + INSIDE, 234, "", "site"),
        _text(x + INSIDE + 10, 251, "top-k", ""),
        *_box(x, 268, "gather", "site", ROOM),
        _line(f"M{x + 12},294V300", "kept"),
        *_tokens(x, 304, True),
    ]
    for i, score in enumerate(SCORES):
        high, kind = 18 * score, "kept" if score > 0.5 else "all"
        parts.append(f'<rect class="{kind}" x="{bars + 8.5 * i:g}" y="{256 - high:g}" width="5" height="{high:g}"/>')
    return parts


def _tokens(x: int, y: int, left: bool) -> list[str]:
    kinds = ["all" if not left else "kept" if score > 0.5 else "gone" for score in SCORES]
    return [
        f'<rect class="{kind}" x="{x + STEP * i:g}" y="{y}" width="{SQUARE}" height="{SQUARE}" rx="2"/>'
        for i, kind in enumerate(kinds)
    ]


def _box(x: int, y: int, label: str, kind: str = "box", wide: int = ROOM - INSIDE) -> list[str]:
    rect = f'<rect class="{kind}" x="{x}" y="{y}" width="{wide}" height="26" rx="5"/>'
    return [rect, _text(x + wide / 2, y + 17.5, label, "mid")] if label else [rect]


def _line(path: str, kind: str) -> str:
    return f'<path class="line {kind}" d="{path}"/>'


def _text(x: float, y: float, text: str, kind: str = "soft") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{text}</text>'
