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
# DiffRate (Chen et al., 2023, its code 91ae3e3): model and G that it is named by, tokens of each block kept by pruning
# and then by merging, the class token among them
DIFFRATE = """\
DeiT-T 0.6: 197 196 180 157 130 107 86 73 63 51 40 3 | 197 187 167 139 114 90 76 66 57 45 37 3
DeiT-T 0.7: 197 196 194 180 150 123 98 82 68 60 52 3 | 197 196 192 158 133 103 88 72 64 58 49 3
DeiT-T 0.8: 197 197 196 186 166 147 117 103 92 80 74 3 | 197 196 190 172 154 125 107 96 84 78 70 3
DeiT-T 0.9: 197 197 196 190 182 166 141 125 113 105 99 3 | 197 196 194 188 172 147 129 115 107 103 96 3
DeiT-T 1.0: 197 197 196 194 188 184 178 164 156 137 129 21 | 197 197 196 190 186 154 148 156 145 135 125 21
DeiT-S 2.3: 197 192 168 143 121 105 92 74 62 45 33 3 | 197 180 156 127 109 98 80 66 52 37 31 3
DeiT-S 2.5: 197 192 174 156 131 115 111 99 76 50 39 3 | 197 186 160 133 119 107 96 82 66 43 37 3
DeiT-S 2.7: 197 196 182 160 141 127 115 105 88 66 49 3 | 197 188 170 147 131 119 109 96 76 54 45 3
DeiT-S 2.9: 197 196 190 168 150 139 129 117 99 78 58 3 | 197 194 176 156 141 133 121 107 88 64 56 3
DeiT-S 3.1: 197 197 194 180 160 147 137 129 115 92 76 3 | 197 196 186 164 150 141 133 121 103 78 68 3
DeiT-B 8.7: 197 192 172 156 131 107 90 72 56 33 17 3 | 197 178 162 141 115 96 78 60 47 21 13 3
DeiT-B 10.0: 197 194 182 168 148 129 113 101 82 49 25 3 | 197 186 174 156 137 117 105 90 66 31 19 3
DeiT-B 10.4: 197 196 188 174 156 141 121 103 90 58 25 3 | 197 190 184 164 145 131 107 94 74 31 21 3
DeiT-B 11.5: 197 197 197 188 170 154 139 123 107 72 43 3 | 197 197 192 178 158 145 127 111 94 50 35 3
DeiT-B 12.5: 197 197 196 192 184 170 154 139 129 94 58 3 | 197 196 194 190 176 160 145 131 115 68 47 3
MAE-B 8.7: 197 192 166 143 119 103 86 72 54 43 37 23 | 197 176 150 127 107 92 76 58 47 41 23 23
MAE-B 10.0: 197 194 173 154 135 120 108 92 76 64 52 40 | 197 181 160 141 122 116 95 80 67 60 40 40
MAE-B 10.4: 197 195 179 159 140 122 105 100 89 71 56 45 | 197 187 166 145 125 109 102 97 75 64 45 45
MAE-B 11.5: 197 196 182 172 162 147 131 109 101 94 70 49 | 197 192 178 164 150 133 115 101 96 82 49 49
MAE-L 31.0: 197 195 188 179 168 157 146 143 131 121 111 102 93 85 76 70 61 53 47 35 31 26 21 14 | 197 191 184 172 161 151 145 135 125 117 106 96 89 80 72 64 54 50 40 27 27 23 14 14
MAE-L 34.7: 197 195 192 189 181 170 161 160 149 140 128 118 109 95 91 82 73 68 58 54 43 38 29 18 | 197 193 190 185 173 164 159 154 142 137 121 111 103 97 82 76 67 61 58 48 35 32 18 18
MAE-L 38.5: 197 197 195 190 187 183 179 171 164 159 151 143 137 114 106 89 88 85 76 57 47 53 32 24 | 197 196 193 189 183 180 175 167 161 158 152 134 120 110 97 91 87 83 65 47 54 34 24 24
MAE-L 42.3: 197 197 197 195 194 193 191 187 182 180 173 149 142 134 125 121 111 106 91 87 77 39 38 32 | 197 197 196 194 193 192 187 183 181 173 154 146 137 127 123 114 105 98 87 75 43 45 32 32
MAE-L 46.1: 197 197 197 196 194 192 191 188 185 181 170 157 154 146 143 139 128 125 111 100 92 83 69 60 | 197 197 196 195 193 191 189 187 183 176 162 155 148 145 139 133 127 118 104 95 86 71 60 60
MAE-H 83.7: 257 255 246 227 200 178 168 159 155 145 140 139 128 119 114 109 107 100 101 102 117 104 103 97 97 102 95 90 82 83 74 56 | 257 252 240 212 186 172 160 163 148 142 138 132 118 114 111 108 103 102 105 106 109 105 108 99 96 96 95 86 79 77 56 56
MAE-H 93.2: 257 257 257 257 248 250 240 239 229 209 160 159 149 111 109 106 104 106 101 104 85 96 88 93 94 88 88 91 81 78 76 75 | 257 257 257 249 242 241 239 229 209 203 159 150 124 107 107 101 100 101 104 89 101 88 89 88 91 86 86 83 78 78 75 75
MAE-H 103.4: 257 256 255 251 245 235 204 197 194 189 185 177 169 160 152 144 146 139 139 136 135 133 131 128 126 126 124 121 114 96 82 53 | 257 256 253 247 238 211 201 195 193 185 179 171 162 154 150 145 141 138 137 135 134 133 130 127 125 125 122 114 101 90 53 53
MAE-H 124.5: 257 256 252 248 238 237 220 214 198 186 189 191 191 185 188 186 186 183 183 182 182 183 183 181 186 182 182 180 178 180 161 136 | 257 254 251 244 238 223 221 203 194 192 191 190 188 184 188 185 184 183 185 183 183 185 183 183 185 183 179 167 177 133 136 136
"""  # noqa: E501
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
    found = [_diffrate(line) for line in DIFFRATE.strip().splitlines()]
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
