"""Token counts that peers published, as schedules: `python -m bench published "DeiT-S 2.9" --json schedule.json`.

Without a name it lists them, with what their publication says they cost and what its own rule of counting gives.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tabulate import tabulate

from bench.tables.results import UsageError
from rs_compile import DiffRate, PiToMe, Schedule

SIZES = {  # width, blocks, patches, side of a patch
    "DeiT-T": (192, 12, 196, 16),
    "DeiT-S": (384, 12, 196, 16),
    "DeiT-B": (768, 12, 196, 16),
    "MAE-B": (768, 12, 196, 16),
    "MAE-L": (1024, 24, 196, 16),
    "MAE-H": (1280, 32, 256, 14),
}
DIFFRATE = Path(__file__).parents[1] / "data" / "diffrate.txt"
# PiToMe (Tran et al., 2024, its code 550b5de) keeps a share of the patches in every block
PITOME_CODE = PiToMe(energy="code", margin=0.75, spare_in="second half", size_bias=False)  # as it runs DeiT
PITOME = (("DeiT-S", 0.9125), ("DeiT-S", 0.925), ("MAE-L", 0.925), ("MAE-H", 0.95))


@dataclass(frozen=True)
class Published:
    """A model's published counts.

    Args:
        name: "DeiT-S 2.9" of DiffRate, "PiToMe DeiT-S 0.925".
        tokens: that each block's attention reads and its MLP reads, the class token among them.
    """

    name: str
    model: str
    schedule: Schedule
    tokens: tuple[tuple[int, int], ...]

    @property
    def macs(self) -> int:
        """Of blocks without norms and matching; DiffRate's rule adds the head and as many patches as there are tokens.

        PiToMe's figures have every block on the tokens that enter it, though its MLP runs on those left.
        """
        width, _, patches, side = SIZES[self.model]
        alone = isinstance(self.schedule.by, PiToMe)
        ends = 0 if alone else (patches + 1) * width * 3 * side**2 + width * 1000
        pairs = [(n, n if alone else left) for n, left in self.tokens]
        return ends + sum((4 * n * width + 2 * n * n + 8 * mlp * width) * width for n, mlp in pairs)


def published() -> dict[str, Published]:
    """All, by name."""
    lines = DIFFRATE.read_text().splitlines()
    found = [_diffrate(line) for line in lines if not line.startswith("#")]
    found += [_pitome(model, share) for model, share in PITOME]
    return {one.name: one for one in found}


def _diffrate(line: str) -> Published:
    name, _, lists = line.partition(": ")
    kept, merged = ([int(n) for n in part.split()] for part in lists.split("|"))
    model = name.split()[0]
    now, tokens, leave, pruned = SIZES[model][2] + 1, [], {}, {}
    for block, (p, m) in enumerate(zip(kept, merged, strict=True)):
        left = min(now, p, m)  # some lists rise again, and a count above the current one keeps all
        tokens.append((now, left))
        if left < now:
            leave[block] = now - left
        if p < now:
            pruned[block] = now - p if m < p else now - left
        now = left
    return Published(name, model, Schedule(merge=leave, by=DiffRate(pruned=pruned)), tuple(tokens))


def _pitome(model: str, share: float) -> Published:
    _, depth, now, _ = SIZES[model]
    tokens, leave = [], {}
    for block in range(depth):
        leave[block] = int(now - now * share)
        tokens.append((now + 1, now + 1 - leave[block]))
        now -= leave[block]
    by = PITOME_CODE if model.startswith("DeiT") else replace(PITOME_CODE, spare_in="first half")
    return Published(f"PiToMe {model} {share}", model, Schedule(merge=leave, by=by), tuple(tokens))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="whose schedule to print; all are listed if not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the schedule into it")


def run(args: argparse.Namespace) -> int:
    known = published()
    if args.name is None:
        print(tabulate(_rows(list(known.values())), ["name", "tokens", "GMAC by their own rule"], floatfmt=".3f"))
        return 0
    if args.name not in known:
        raise UsageError(f"no published counts {args.name!r}; write one of {', '.join(map(repr, known))}")
    text = known[args.name].schedule.to_json()
    if args.json is None:
        print(text)
    else:
        args.json.write_text(text + "\n")
    return 0


def _rows(found: Sequence[Published]) -> list[tuple[str, str, float]]:
    return [(p.name, " ".join(str(left) for _, left in p.tokens), p.macs / 1e9) for p in found]
