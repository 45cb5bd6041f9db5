"""Reads the C++ that Inductor generates: its loop nests, and how many elements each moves to or from memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_KERNEL = re.compile(r"(cpp_fused_\w+) = async_compile\.cpp_pybinding\(.*?r'''(.*?)'''\)", re.DOTALL)
_POINTER = re.compile(r"(?:const )?([\w:]+)\* (\w+_ptr\d+)")
_ALIAS = re.compile(r"auto (\w+_ptr\d+) = (\w+_ptr\d+);")
_LOOP = re.compile(r"for\(int64_t (x\d+)=static_cast<int64_t>\(0L\); x\d+<static_cast<int64_t>\((\d+)L\)")
_ACCESS = re.compile(r"(\w+_ptr\d+)(?: \+ |\[)static_cast<int64_t>\(([^;]*?)\)[,\])]")

_BYTES = {"float": 4, "at::BFloat16": 2, "int64_t": 8, "double": 8, "bool": 1}


@dataclass(frozen=True)
class Access:
    """A load or a store.

    Args:
        pointer: in the kernel.
        dtype: of what it points to, in C++.
        stored: written, not read.
        elements: how many different ones: the product of the loops that its index moves with; of all, where it gathers.
    """

    pointer: str
    dtype: str
    stored: bool
    elements: int


@dataclass(frozen=True)
class Nest:
    """A loop nest at the top level of a kernel."""

    kernel: str
    text: str
    accesses: tuple[Access, ...]

    def large(self, elements: int) -> list[Access]:
        """The accesses to so many elements or more."""
        return [a for a in self.accesses if a.elements >= elements]


def nests(code: str) -> list[Nest]:
    """All loop nests of a generated module, in order."""
    found = []
    for name, body in _KERNEL.findall(code):
        types = {pointer: dtype for dtype, pointer in _POINTER.findall(body)}
        types |= {alias: types[pointer] for alias, pointer in _ALIAS.findall(body)}
        for text in re.split(r"\n    \{\n", body)[1:]:
            found.append(Nest(name, text, tuple(_accesses(text, types))))
    return [nest for nest in found if nest.accesses]


def moved(code: str) -> int:
    """Bytes that a generated module reads and writes in its loops, each kernel as often as it is called."""
    calls = code[code.index("def call(") :]
    return sum(
        a.elements * _BYTES[a.dtype] * len(re.findall(rf"\b{nest.kernel}\(", calls))
        for nest in nests(code)
        for a in nest.accesses
    )


def _accesses(text: str, types: dict[str, str]) -> Iterator[Access]:
    loops: list[tuple[int, str, int]] = []  # indentation, variable, extent
    tail = math.inf  # indentation of a branch for what is left of a vectorised loop, counted with the loop
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip():
            while loops and loops[-1][0] >= indent and line.strip() not in "{}":
                loops.pop()
            tail = math.inf if indent <= tail and line.strip() not in "{}" else tail
        if "C10_UNLIKELY" in line:
            tail = indent
        if loop := _LOOP.search(line):
            loops.append((indent, loop[1], int(loop[2])))
        elif indent <= tail:
            for match in _ACCESS.finditer(line):
                gathers = "tmp" in match[2]  # by an index in memory, which is another one in every turn
                moving = {name: extent for _, name, extent in loops if gathers or re.search(rf"\b{name}\b", match[2])}
                stored = ".store(" in line or re.match(rf"\s*{match[1]}\[", line) is not None
                yield Access(match[1], types[match[1]], stored, math.prod(moving.values()))
