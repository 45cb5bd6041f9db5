"""Schedules that are refused, and in which words."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest

from passes.graph.base import ScheduleError
from passes.sites.grid_prune import GridPrune
from rs_compile import (
    DiffRate,
    Lowest,
    Random,
    Shift,
    Stream,
    ToMe,
    TopViM,
    VidTLDR,
    Ward,
)
from rs_compile.schedule import Schedule
from rs_compile.schedule_json import our_version

OURS = our_version()


def says(text: str) -> str:
    """A pattern for an error that begins like this."""
    return f"^{re.escape(text)}"


@pytest.mark.parametrize(
    "ratio",
    [
        0,
        0.0,
        -0.1,
        1.0000001,
        2,
        10**400,
        float("nan"),
        float("inf"),
        True,
        Fraction(1, 10**400),
        "0.8",
        None,
        1j,
    ],
)
def test_refuses_a_keep_ratio(ratio: Any) -> None:
    with pytest.raises(
        ScheduleError,
        match=says(
            f"the keep ratio of block 3 is {ratio!r}; write a number above 0 and at most 1, like 0.8 to keep 80%"
        ),
    ):
        Schedule({3: ratio})


@pytest.mark.parametrize("block", [-1, 1.0, "0", None, True])
def test_refuses_a_block_index(block: Any) -> None:
    with pytest.raises(
        ScheduleError, match=says(f"block index {block!r} in keep; write an integer of at least 0, counted from 0")
    ):
        Schedule({block: 0.8})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"keep": 0.8},
            "keep is 0.8, not a mapping of block index to keep ratio; write keep={0: 0.8, 3: 0.8}, or",
        ),
        ({"score": "shift"}, "score is 'shift'; write Shift(), Random() or another score of rs_compile"),
        ({"score": Shift}, "score is <class 'passes.sites.importance.Shift'>; write Shift(), Random()"),
        (
            {"by": "tome", "merge": {1: 3}},
            "by is 'tome'; write Stream(), ToMe(), PiToMe(), VidTLDR(), DiffRate() or Ward()",
        ),
        ({"protected": 1}, "protected is 1; write token indices like (0, 1), or None to find them"),
        ({"protected": "01"}, "protected is '01'; write token indices like (0, 1), or None to find them"),
        (
            {"protected": (0, -1)},
            "protected token -1; write an integer of at least 0, its place in the sequence",
        ),
        ({"protected": (True,)}, "protected token True; write an integer of at least 0"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=says(message)):
        Schedule(**({"keep": {0: 0.8}} | options))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the schedule is no JSON ("),
        ("[1]", 'the schedule is [1]; write an object like {"keep": {"0": 0.8}}'),
        ('{"rounding": "kept"}', 'the schedule has no keep, merge or grid; write "keep": {"0": 0.8}'),
        ('{"keep": [0.8]}', 'keep is [0.8] in the schedule; write an object like "keep": {"0": 0.8}'),
        ('{"grid": {"0": 8}}', "grid of stage 0: 8; write an object with the keys rows, columns, mode"),
        ('{"grid": {"0": {"row": 8}}}', "grid of stage 0: unknown key 'row'; write an object with the keys rows"),
        ('{"grid": {"x": {"rows": 8}}}', "stage index 'x' in grid; write an integer of at least 0"),
        ('{"merge": {"0": 13, "0": 8}}', "key '0' stands twice in the schedule; keep one of them"),
        (
            '{"keep": {"0": 0.8}, "ratio": 1, "layer": 2}',
            "unknown key 'layer', 'ratio' in the schedule; remove it, the keys are keep, score, protected, merge, by, ",
        ),
        ('{"keep": {"00": 0.8}}', "block index '00' in keep; write an integer of at least 0, counted from 0"),
        ('{"keep": {"0": NaN}}', "the keep ratio of block 0 is nan; write a number above 0 and at most 1"),
        ('{"keep": {"0": 0.8, "0": 0.7}}', "key '0' stands twice in the schedule; keep one of them"),
        (
            '{"keep": {"0": 0.8}, "rs_compile": "9.1", "tint": 1}',
            f"unknown key 'tint' in the schedule, which rs_compile 9.1 wrote (this is {OURS}); remove it, the keys",
        ),
        (
            '{"keep": {"0": 0.8}, "rs_compile": "9.1", "version": 2}',
            f"version 2 of the schedule, which rs_compile 9.1 wrote (this is {OURS}); write it anew in version 1",
        ),
        (
            '{"keep": {"0": 0.8}, "score": {"kind": "shift", "metric": "l3"}}',
            "unknown metric 'l3'; write one of 'l2', 'l1', 'cosine'",
        ),
        ('{"keep": {"0": 0.8}, "score": "shift"}', "score is 'shift'; write an object with a kind of 'shift', 'class-"),
        ('{"keep": {"0": 0.8}, "score": {"kind": "x"}}', "score has the kind 'x'; write an object with a kind of"),
        (
            '{"keep": {"0": 0.8}, "score": {"kind": "random", "seed": 1}}',
            "score 'random': unknown key 'seed'; write an object with the keys kind alone",
        ),
        (
            '{"merge": {"0": 8}, "by": {"kind": "vid-tldr", "importance": {"kind": "lowest"}}}',
            "importance is Lowest(score=Shift(of='mlp', metric='l2', with_skip=False)); write a score that is not",
        ),
    ],
)
def test_from_json_refuses(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=says(message)):
        Schedule.from_json(text)


@pytest.mark.parametrize("r", [-1, 1.0, 1.5, True, "13", float("nan")])
def test_refuses_a_merge(r: Any) -> None:
    with pytest.raises(
        ScheduleError,
        match=says(f"merge of block 2 is {r!r}; write how many tokens merge away, like 13, or a share below 1"),
    ):
        Schedule(merge={2: r})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep": {1: 0.8}, "merge": {1: 3}}, "block 1 both prunes and merges; leave it in one of keep and merge"),
        ({"keep": {1: 0.8}, "grid": {0: GridPrune(1, 1)}}, "grid prunes a CNN's stages, keep and merge a"),
        (
            {"merge": {1: 3}, "by": DiffRate(pruned={1: 1, 2: 1})},
            "DiffRate drops tokens in block 2, and merge says nothing leaves there; merge counts what is dropped and",
        ),
        (
            {"keep": {1: 0.8}, "score": TopViM("code"), "gap": "decay"},
            "gap is 'decay', and TopViM(form='code') moves the class token",
        ),
        ({"merge": 13}, "merge is 13, not a mapping of index to how many tokens merge"),
        ({"merge": {-1: 13}}, "block index -1 in merge; write an integer of at least 0, counted from 0"),
        ({"grid": {0: 8}}, "grid of stage 0 is 8; write GridPrune(rows=8, columns=8)"),
        ({"grid": {"a": GridPrune(1, 1)}}, "stage index 'a' in grid; write an integer of at least 0"),
        (
            {"keep": {0: 0.8}, "by": ToMe()},
            "by is ToMe(size_bias=True, weighted_mean=False, restore='change'), and noth",
        ),
        (
            {"merge": {0: 8}, "score": Random()},
            "score is Random(), and nothing reads it without keep or grid; remove it",
        ),
        ({"merge": {0: 8}, "rounding": "kept"}, "rounding is 'kept', and nothing reads it without keep; remove it"),
        (
            {"grid": {0: GridPrune(1, 1)}, "score": Shift("attention")},
            "score is Shift(of='attention', metric='l2', with_skip=False), and a stage has no tokens or attention",
        ),
        ({"grid": {0: GridPrune(1, 1)}, "protected": (0,)}, "protected names tokens, and a stage has rows and columns"),
    ],
)
def test_refuses_what_cannot_go_together(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ScheduleError, match=says(text)):
        Schedule(**options)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Shift(of="ffn"), "unknown of 'ffn'; write one of 'mlp', 'attention', 'block'"),
        (lambda: Shift(metric="L2"), "unknown metric 'L2'; write one of 'l2', 'l1', 'cosine'"),
        (lambda: Shift(with_skip=1), "with_skip is 1; write True or False"),
        (lambda: Lowest(Lowest()), "Lowest of Lowest(score=Shift(of='mlp', metric='l2', with_skip=False)); write Low"),
        (lambda: ToMe(size_bias=1), "size_bias is 1; write True or False"),
        (lambda: Ward(weighted_mean=None), "weighted_mean is None; write True or False"),
        (lambda: Stream(restore="keep"), "unknown restore 'keep'; write one of 'change', 'copy'"),
        (lambda: VidTLDR("shift"), "importance is 'shift'; write a score that is not Lowest, like Shift()"),
    ],
)
def test_refuses_a_score_or_a_merger(make: Any, text: str) -> None:
    with pytest.raises(ScheduleError, match=says(text)):
        make()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rows": -1}, "rows is -1; write how many leave, an integer of at least 0"),
        ({"columns": 1.5}, "columns is 1.5; write how many leave, an integer of at least 0"),
        ({"mode": "row"}, "unknown mode 'row'; write one of 'line', 'token'"),
        ({"against": "input"}, "unknown against 'input'; write one of 'shortcut', 'first-block', 'sum'"),
    ],
)
def test_refuses_a_grid_prune(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ScheduleError, match=says(text)):
        GridPrune(**options)
