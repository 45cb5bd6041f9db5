"""Rows of a graph as an SVG file: time runs down, a lane for each value that is still read, a colour for its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from bench.graphs.recorded import Row

ROW, LANE, LEFT, TOP = 26, 16, 16, 64  # pixels
LETTER, NARROW = 6.7, 6.1  # width of a letter of the labels and of the names of bands
_STYLE = """\
.card{fill:#fbfbfc;stroke:#8a929c}text{font:12px ui-sans-serif,system-ui,sans-serif;fill:#1f2328}
.title{font-weight:700;font-size:13px}.shape,.key{fill:#57606a}.band{fill:#8a929c;fill-opacity:.14}
.name{font-size:11px;fill:#57606a;font-style:italic}.edge{fill:none;stroke-width:2.2}
.all{stroke:#5b7fb4}.kept{stroke:#d2791e}.one{stroke:#2f9e63}.none{stroke:#8a929c}
circle.all{fill:#5b7fb4}circle.kept{fill:#d2791e}circle.one{fill:#2f9e63}circle.none{fill:#8a929c}
@media(prefers-color-scheme:dark){.card{fill:#1f242c;stroke:#6b7480}text{fill:#e6e9ee}
.shape,.key,.name{fill:#aab3be}.band{fill:#aab3be;fill-opacity:.13}}"""


def svg(title: str, rows: Sequence[Row], tokens: Mapping[str, int], keys: Mapping[str, str]) -> str:
    """One picture.

    Args:
        tokens: how many tokens a value of each colour ("all", "kept", "one") has.
        keys: what the legend calls these.
    """
    colour = [_colour(row, tokens) for row in rows]
    lanes = _lanes(rows)
    text_at = LEFT + LANE * (max(lanes, default=0) + 1)
    used = [kind for kind in keys if kind in colour]
    names = _bands(rows)
    blocks = {name.partition(": ")[0] for _, _, name in names if ": " in name}
    if len(blocks) == 1:  # nobody needs to be told which
        names = [(a, b, name.rpartition(": ")[2]) for a, b, name in names]
    room = {first: NARROW * len(name) + 8 for first, _, name in names}
    widest = max(LETTER * len(f"{row.label}  {row.shape}") + room.get(i, 0) for i, row in enumerate(rows))
    width = int(max(text_at + widest + 10, len(title) * 7.6 + 30))
    height = TOP + ROW * len(rows) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{escape(title, quote=True)}"><style>{_STYLE}</style>',
        f'<rect class="card" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        f'<text class="title" x="14" y="23">{escape(title)}</text>',
    ]
    at = 14.0
    for kind in used:
        parts.append(f'<circle class="{kind}" cx="{at + 5:g}" cy="41" r="5"/>')
        parts.append(f'<text class="key" x="{at + 15:g}" y="45">{escape(keys[kind])}</text>')
        at += 15 + len(keys[kind]) * LETTER + 16
    for first, last, name in names:
        y, high = TOP + ROW * first, ROW * (last - first + 1) - 2
        parts.append(f'<rect class="band" x="6" y="{y}" width="{width - 12}" height="{high}" rx="5"/>')
        parts.append(f'<text class="name" x="{width - 12}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
    for reader, row in enumerate(rows):
        for i in row.inputs:
            path = _path(lanes[i], i, lanes[reader], reader)
            parts.append(f'<path class="edge {colour[i]}" d="{path}"/>')
    for i, row in enumerate(rows):
        x, y = _at(lanes[i], i)
        parts.append(f'<circle class="{colour[i]}" cx="{x}" cy="{y}" r="5"/>')
        parts.append(
            f'<text x="{text_at}" y="{y + 4}">{escape(row.label)}<tspan class="shape" dx="8">{row.shape}</tspan></text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _colour(row: Row, tokens: Mapping[str, int]) -> str:
    return next((kind for kind, count in tokens.items() if count in row.sizes), "none")


def _bands(rows: Sequence[Row]) -> list[tuple[int, int, str]]:
    """Rows that follow each other in one band: the first, the last, its name."""
    found: list[tuple[int, int, str]] = []
    for i, row in enumerate(rows):
        if found and found[-1][1] == i - 1 and found[-1][2] == row.band:
            found[-1] = (found[-1][0], i, row.band)
        elif row.band:
            found.append((i, i, row.band))
    return found


def _lanes(rows: Sequence[Row]) -> list[int]:
    """A lane for each row, its own until the last that reads it; a sum goes on in the lane of its stream."""
    last = [max((r for r, row in enumerate(rows) if i in row.inputs), default=i) for i in range(len(rows))]
    lanes: list[int] = []
    held: dict[int, int] = {}  # lane -> the row that has it
    for number, row in enumerate(rows):
        free = [lane for lane, owner in held.items() if last[owner] <= number]
        ending = [lanes[i] for i in row.inputs if last[i] == number and held.get(lanes[i]) == i]
        for lane in free:
            del held[lane]
        lane = min(ending) if ending else next(n for n in range(len(rows) + 1) if n not in held)
        lanes.append(lane)
        held[lane] = number
    return lanes


def _at(lane: int, row: int) -> tuple[int, int]:
    return LEFT + LANE * lane, TOP + ROW * row + ROW // 2 - 1


def _path(lane: int, row: int, reader_lane: int, reader: int) -> str:
    """Down its own lane, and over to the reader's in the last row."""
    (x, y), (u, v) = _at(lane, row), _at(reader_lane, reader)
    if x == u:
        return f"M{x},{y}V{v}"
    turn = v - ROW
    return f"M{x},{y}V{turn}C{x},{turn + ROW // 2} {u},{turn + ROW // 2} {u},{v}"
