"""What stands below a table: how its numbers came about, and what was left out."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.tables.options import Setting
from bench.tables.results import Row, first_process


def notes(rows: Sequence[Row], setting: Setting, of_paper: str = "") -> list[str]:
    """What a reader must know about the numbers of these rows, a line each.

    Args:
        rows: of the table.
        setting: they were measured with.
        of_paper: what the paper's accuracy is of.
    """
    lines = ["GFLOPs: of one sample, counted on the rewritten graph in fvcore's convention."]
    if setting.quick:
        lines.insert(0, "quick: stand-ins for the paper's models, few digits and rounds, numbers that mean nothing.")
    if any("throughput" in row for row in rows):
        batches = "/".join(dict.fromkeys(str(row["batch"]) for row in rows if "batch" in row))
        lines.append(
            f"throughput: {setting.describe()}, batch {batches}, medians of {setting.rounds} interleaved rounds, "
            f"backend {setting.backend}; the paper's: RTX A6000."
        )
    measured = {row["data"]: row for row in rows if "data" in row}
    for data, row in measured.items():
        if data == "digits":
            share = row["accuracy"] / 100
            error = 100 * (share * (1 - share) / row["images"]) ** 0.5
            lines.append(
                f"accuracy: in %, of the demo's digits ViT on {row['images']} digits, as no data was given; "
                f"standard error {error:.1f}."
            )
        elif "unread" in row:
            lines.append(
                f"accuracy: of answers in %, {row['questions']} questions on {row['images']} videos of {data}."
            )
        elif "arithmetic" in row:
            lines.append(f"accuracy: R@1 in %, arithmetic mean of both directions, {row['images']} videos of {data}.")
        elif row["accuracy"] is None:
            lines.append(
                f"agreement with the dense model in %, cosine and KL of the logits: on {row['images']} pictures of "
                f"{data}, which has no class folders."
            )
        else:
            lines.append(f"accuracy: top-1 in % on {row['images']} pictures of {data}.")
    return [*lines, *([of_paper] if of_paper and measured else [])]


def give(table: str, lines: Sequence[str], rows: Sequence[Row]) -> int:
    """Prints a table with its notes, and names the files that could not be read.

    Returns:
        The exit code: 1 where there are such files.
    """
    if first_process():
        print("\n".join([table, *lines]))
    skipped = {s["file"]: s["reason"] for row in rows for s in row.get("skipped", ())}
    if skipped and first_process():
        print("\n".join(["left out, as they could not be read:", *map(": ".join, skipped.items())]), file=sys.stderr)
    return int(bool(skipped))
