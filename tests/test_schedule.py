"""Schedules: what they accept, and that nothing gets lost on the way."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import pickle
import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.graph.base import CompileError, ScheduleError
from passes.sites.grid_prune import Against, GridPrune, Mode, Order
from passes.sites.ranked import Energy
from passes.sites.retarget import Gap
from passes.sites.score import Metric, Operation
from passes.sites.site import Restore
from rs_compile import (
    AttentionEntropy,
    ClassAttention,
    DiffRate,
    Lowest,
    MeanAttention,
    PiToMe,
    Random,
    Shift,
    Stream,
    ToMe,
    TopViM,
    VidTLDR,
    Ward,
    ZeroTPrune,
)
from rs_compile.schedule import Rounding, Schedule, removed
from rs_compile.schedule_json import our_version

OURS = our_version()

RATIOS = st.floats(min_value=0, max_value=1, exclude_min=True)
FLAGS, SHIFTS = (
    st.booleans(),
    st.builds(
        Shift,
        of=st.sampled_from(get_args(Operation)),
        metric=st.sampled_from(get_args(Metric)),
        with_skip=st.booleans(),
    ),
)
MAPPED = st.sampled_from(
    [
        ClassAttention(),
        ClassAttention(size_bias=True),
        MeanAttention(),
        AttentionEntropy(),
        ZeroTPrune(),
        ZeroTPrune(0.25, 3, "uniform", True),
        TopViM(),
        Random(),
    ]
)
SCORES = SHIFTS | MAPPED | st.builds(Lowest, SHIFTS | MAPPED)
HOW = {"size_bias": FLAGS, "weighted_mean": FLAGS, "restore": st.sampled_from(get_args(Restore))}
BY = (
    st.one_of(*(st.builds(kind, **HOW) for kind in (Stream, ToMe, Ward)))
    | st.builds(VidTLDR, SHIFTS | MAPPED, **HOW)
    | st.builds(PiToMe, st.floats(-1, 1), energy=st.sampled_from(get_args(Energy)), **HOW)
    | st.builds(DiffRate, SHIFTS | MAPPED, **HOW)
)
KEEP = st.dictionaries(st.integers(0, 200), RATIOS, min_size=1, max_size=12)
MERGE = st.dictionaries(
    st.integers(201, 300), st.integers(0, 50) | st.floats(0, 1, exclude_max=True), min_size=1, max_size=4
)
PROTECTED = st.none() | st.lists(st.integers(0, 20), max_size=4)
SCHEDULES = (
    st.builds(
        Schedule,
        keep=KEEP,
        score=SCORES,
        protected=PROTECTED,
        rounding=st.sampled_from(get_args(Rounding)),
        multiple_of=st.integers(1, 64),
    )
    | st.builds(Schedule, keep=KEEP, score=SCORES, merge=MERGE, by=BY)
    | st.builds(
        Schedule,
        merge=MERGE,
        by=BY,
        gap=st.sampled_from(get_args(Gap)),
    )
    | st.builds(
        Schedule,
        grid=st.dictionaries(
            st.integers(0, 5),
            st.builds(
                GridPrune,
                rows=st.integers(0, 9),
                columns=st.integers(0, 9),
                mode=st.sampled_from(get_args(Mode)),
                order=st.sampled_from(get_args(Order)),
                against=st.sampled_from(get_args(Against)),
            ),
        ),
    )
)


def says(text: str) -> str:
    """A pattern for an error that begins like this."""
    return f"^{re.escape(text)}"


@pytest.mark.parametrize(
    ("counts", "keep_ratio"),
    [
        ((197, 158, 127, 102), 0.8),  # DeiT
        ((2352, 1882, 1506, 1205), 0.8),  # UMT, retrieval
        ((2352, 2117, 1906, 1716), 0.9),  # UMT, question answering
        ((10, 8), 0.8),  # int((1 - 0.8) * 10) is 1 in floats
        ((197, 197), 1),
        ((0, 0), 0.5),
    ],
)
def test_token_counts_of_the_paper(counts: tuple[int, ...], keep_ratio: float) -> None:
    for before, after in pairwise(counts):
        assert before - removed(before, keep_ratio) == after


@given(st.integers(0, 5000), st.integers(1, 1000))
def test_removed_is_exact_in_decimals(n: int, per_mille: int) -> None:
    assert removed(n, per_mille / 1000) == (1000 - per_mille) * n // 1000


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 40))
def test_removed_is_exact_in_fractions(kept: int, gone: int, times: int) -> None:
    assert removed((kept + gone) * times, kept / (kept + gone)) == gone * times


def test_removed_reads_a_float32_as_it_was_written() -> None:
    ratio: Any = np.float32(0.8)
    assert removed(10, ratio) == 2


@given(RATIOS, st.integers(1, 5000))
def test_some_token_always_stays(keep_ratio: float, n: int) -> None:
    assert 0 <= removed(n, keep_ratio) < n


@pytest.mark.parametrize("n", [-1, 1.5, True])
def test_removed_refuses_a_count_that_is_none(n: Any) -> None:
    with pytest.raises(ScheduleError, match=says(f"the token count is {n!r}; pass an integer of at least 0")):
        removed(n, 0.5)


@given(n=st.integers(1, 3000), ratio=RATIOS, multiple=st.integers(1, 70), rounding=st.sampled_from(get_args(Rounding)))
def test_what_stays_is_the_next_multiple_or_everything(n: int, ratio: float, multiple: int, rounding: Rounding) -> None:
    plain = Schedule({0: ratio}, rounding=rounding).left(n, ratio)
    left = Schedule({0: ratio}, rounding=rounding, multiple_of=multiple).left(n, ratio)
    assert plain <= left < plain + multiple
    assert left % multiple == 0 or left == n
    if rounding == "removed":
        assert n - Schedule(merge={0: n - plain}, multiple_of=multiple).merged(n, n - plain) == left


def test_deit_by_sixteens() -> None:
    schedule = Schedule({0: 0.8, 3: 0.8, 6: 0.8}, multiple_of=16)
    counts = [197]
    for ratio in schedule.keep.values():
        counts.append(schedule.left(counts[-1], ratio))
    assert counts == [197, 160, 128, 112]


@pytest.mark.parametrize("multiple", [0, -16, 1.5, True, "16"])
def test_a_multiple_is_a_positive_integer(multiple: Any) -> None:
    with pytest.raises(ScheduleError, match="write an integer of at least 1, like 16"):
        Schedule({0: 0.8}, multiple_of=multiple)


@given(SCHEDULES)
def test_json_round_trip(schedule: Schedule) -> None:
    again = Schedule.from_json(schedule.to_json())
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.to_json() == schedule.to_json()


def test_json_is_readable() -> None:
    assert json.loads(Schedule({3: 0.5, 0: 0.8}, protected=(0,)).to_json()) == {
        "version": 1,
        "rs_compile": importlib.metadata.version("rs-compile"),
        "keep": {"0": 0.8, "3": 0.5},
        "score": {"kind": "shift", "of": "mlp", "metric": "l2", "with_skip": False},
        "protected": [0],
        "merge": {},
        "grid": {},
        "gap": "compact",
        "rounding": "removed",
        "multiple_of": 1,
    }
    merged = json.loads(Schedule(merge={1: 3}, by=VidTLDR(Shift("attention"), size_bias=False)).to_json())
    assert "score" not in merged and merged["by"] == {
        "kind": "vid-tldr",
        "size_bias": False,
        "weighted_mean": False,
        "restore": "change",
        "importance": {"kind": "shift", "of": "attention", "metric": "l2", "with_skip": False},
    }
    both = Schedule(merge={2: 9, 10: 4}, by=DiffRate(pruned={10: 1, 2: 3}))
    assert json.loads(both.to_json())["by"]["pruned"] == {"2": 3, "10": 1}
    assert Schedule.from_json(both.to_json()) == both
    code = Schedule({1: 0.8}, score=TopViM("code"))
    assert Schedule.from_json(code.to_json()) == code


def test_keep_is_a_mapping_that_nobody_can_change() -> None:
    given_keep = {3: 0.5, 0: 0.8}
    schedule = Schedule(given_keep)
    frozen: Any = schedule
    keep: Any = schedule.keep
    given_keep[0] = 0.1
    assert schedule.keep == {0: 0.8, 3: 0.5}
    assert list(schedule.keep) == [0, 3]
    assert schedule.keep.get(1, 1.0) == 1.0
    with pytest.raises(TypeError):
        keep[0] = 0.1
    with pytest.raises(AttributeError):
        frozen.metric = "l1"


def test_copies_are_equal_and_hash_alike() -> None:
    schedule = Schedule({0: 0.8}, protected=(0,))
    for twin in (
        copy.deepcopy(schedule),
        pickle.loads(pickle.dumps(schedule)),
        Schedule({0: 0.8}, protected=(0,)),
    ):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
    assert schedule != Schedule({0: 0.7}, protected=(0,))
    assert "keep={0: 0.8}" in repr(schedule)


def test_numbers_of_other_kinds_are_taken() -> None:
    keep: Any = {np.int64(2): Fraction(1, 2), 0: 1}
    protected: Any = [np.int64(1), 0, 1]
    schedule = Schedule(keep, protected=protected)
    assert schedule == Schedule({0: 1.0, 2: 0.5}, protected=(0, 1))
    assert schedule.to_json() == Schedule({0: 1.0, 2: 0.5}, protected=(0, 1)).to_json()


@pytest.mark.parametrize(("keep", "prunes"), [({}, False), ({0: 1, 3: 1.0}, False), ({0: 1, 3: 0.99}, True)])
def test_prunes(keep: dict[int, float], prunes: bool) -> None:
    assert Schedule(keep).prunes is prunes


def test_uniform() -> None:
    assert Schedule.uniform(12, 0.9) == Schedule(dict.fromkeys(range(12), 0.9))
    assert Schedule.uniform(9, 0.8, every=3) == Schedule({0: 0.8, 3: 0.8, 6: 0.8})
    assert Schedule.uniform(12, 0.8, every=4, start=2) == Schedule({2: 0.8, 6: 0.8, 10: 0.8})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth is 0; write an integer of at least 1"),
        ({"every": 0}, "every is 0; write an integer of at least 1"),
        ({"start": -1}, "start is -1; write an integer of at least 0"),
        ({"start": 12}, "start is 12, past the last of 12 blocks; write a start from 0 to 11"),
        ({"keep_ratio": 0}, "the keep ratio of block 0 is 0; write a number above 0 and at most 1"),
    ],
)
def test_uniform_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=says(message)):
        Schedule.uniform(**({"depth": 12, "keep_ratio": 0.8} | options))


def test_of() -> None:
    schedule = Schedule({0: 0.8})
    assert Schedule.of(schedule) is schedule
    assert Schedule.of({0: 0.8}) == schedule
    no_schedule: Any = 0.8
    with pytest.raises(
        ScheduleError,
        match=says("0.8 is no schedule; pass a Schedule, a dict like {0: 0.8, 3: 0.8}, pairs like"),
    ):
        Schedule.of(no_schedule)


def test_of_text_and_files(tmp_path: Path) -> None:
    schedule = Schedule({0: 0.8}, merge={3: 5}, by=Ward())
    (tmp_path / "schedule.json").write_text(schedule.to_json())
    assert Schedule.of(schedule.to_json()) == schedule
    assert Schedule.of("0:0.8,3:0.7") == Schedule({0: 0.8, 3: 0.7})
    assert Schedule.of(tmp_path / "schedule.json") == Schedule.of(str(tmp_path / "schedule.json")) == schedule
    with pytest.raises(ScheduleError, match=r"no schedule can be read from .*none\.json"):
        Schedule.of(tmp_path / "none.json")


def test_parse() -> None:
    assert Schedule.parse("0:0.8,3:0.8,6:0.8") == Schedule({0: 0.8, 3: 0.8, 6: 0.8})
    assert Schedule.parse(" 6 : 1 , 0:.5 ") == Schedule({0: 0.5, 6: 1.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ", 'the schedule is empty; write block:ratio pairs, "0:0.8,3:0.8,6:0.8", or 0:1 to prune nothing'),
        ("0=0.8", """'0=0.8' is not block:ratio; write pairs like "0:0.8,3:0.8,6:0.8\""""),
        ("0:0.8,", "'' is not block:ratio; write pairs like"),
        ("0:", "'0:' is not block:ratio; write pairs like"),
        ("0:80%", "the keep ratio of block 0 is '80%'; write a number above 0 and at most 1"),
        ("0:0.8:1", "the keep ratio of block 0 is '0.8:1'; write a number above 0 and at most 1"),
        ("0:nan", "the keep ratio of block 0 is nan; write a number above 0 and at most 1"),
        ("-1:0.8", "block index '-1' in keep; write an integer of at least 0, counted from 0"),
        ("a:0.8", "block index 'a' in keep; write an integer of at least 0, counted from 0"),
        ("0:0.8,0:0.7", "block 0 has two keep ratios; keep one of them"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=says(message)):
        Schedule.parse(text)


def test_a_schedule_error_is_a_compile_error_and_a_value_error() -> None:
    for kind in (CompileError, ValueError):
        with pytest.raises(kind):
            Schedule({0: 2})


def test_a_merge_is_a_count_or_a_share() -> None:
    schedule = Schedule(merge={0: 13, 2: 0.3})
    assert [schedule.merged(197, r) for r in schedule.merge.values()] == [13, 59]
    assert schedule.merged(10, 0.7) == 7  # int(10 * 0.7) is 7 in floats only by luck; 0.57 of 100 would be 56
    assert schedule.merged(100, 0.57) == 57
    assert schedule.prunes
    assert not Schedule(merge={0: 0}).prunes
