"""The page of codes says what the table says, in its order, and each section provokes its own code."""

from __future__ import annotations

import re
from pathlib import Path

from passes.graph.codes import Code

PAGE = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text()


def test_each_code_has_its_section() -> None:
    assert re.findall(r"^\| \[(\S+)\]\(#(\S+)\) \| (.+) \|$", PAGE, re.M) == [
        (code, code.lower(), code.heading) for code in Code
    ]
    heads = re.split(r"^### (RSC-\d+)$", PAGE, flags=re.M)[1:]
    assert heads[::2] == list(Code)
    for code, text in zip(Code, heads[1::2], strict=True):
        assert text.startswith(f"\n\n**{code.heading}.** {code.meaning}\n\nWay out: {code.way_out}\n\n```python\n")


def test_each_section_provokes_its_code() -> None:
    """That the blocks run is a test of all pages."""
    for code, text in zip(Code, re.split(r"^### RSC-\d+$", PAGE, flags=re.M)[1:], strict=True):
        (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
        assert f'refused("{code}", ' in block or f"[{code}]" in block or code is Code.COMMAND
