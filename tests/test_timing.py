"""Interleaved timing: the order of calls, the ratios, and what a comparison holds."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import timm
import torch

from rs_compile import CompileError, OptimizedModel, Schedule
from rs_compile.comparison import Sweep, compare
from rs_compile.timing import COMPILED, EAGER, PRUNED, Spread, Timing, compiled, interleaved


def test_calls_take_turns() -> None:
    order: list[str] = []

    def call(name: str) -> Any:
        def run() -> None:
            order.append(name)
            time.sleep(1e-3)

        return run

    timing = interleaved({"a": call("a"), "b": call("b")}, 3, least_seconds=1e-9)
    assert order == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 3  # warm-up: a first call and two timed ones
    assert {name: len(values) for name, values in timing.seconds.items()} == {"a": 3, "b": 3}


def test_a_short_call_is_repeated_and_its_seconds_are_those_of_one() -> None:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1
        time.sleep(2e-3)

    timing = interleaved({"a": run}, 2, least_seconds=0.01)
    assert calls > 3 + 2 * 1
    assert all(1e-3 < s < 0.01 for s in timing.seconds["a"])


def test_progress_tells_each_stage() -> None:
    said: list[str] = []
    interleaved({"a": lambda: None}, 2, least_seconds=1e-9, say=said.append)
    assert said == ["a: first call", "round 1 of 2", "round 2 of 2"]


@pytest.mark.parametrize(("calls", "rounds"), [({}, 3), ({"a": lambda: None}, 0)])
def test_nothing_to_time_is_refused(calls: Any, rounds: int) -> None:
    with pytest.raises(ValueError, match="give at least one of each"):
        interleaved(calls, rounds)


def test_the_ratio_is_taken_within_a_round() -> None:
    # the machine is four times slower in the last round; within each round b is twice as fast
    timing = Timing({"a": (2.0, 2.0, 8.0), "b": (1.0, 1.0, 4.0)})
    assert timing.ratio("a", "b") == Spread(2.0, 2.0, 2.0)
    assert timing.of("a") == Spread(2.0, 2.0, 5.0)


def test_spread_is_the_median_with_quartiles() -> None:
    spread = Spread.of((5.0, 1.0, 3.0, 2.0, 4.0))
    assert spread == Spread(3.0, 2.0, 4.0)
    assert str(spread) == "3.00x [2.00, 4.00]"
    assert spread.to_dict() == {"median": 3.0, "quartile_low": 2.0, "quartile_high": 4.0}


def test_eager_compiles_nothing() -> None:
    model = torch.nn.Linear(2, 2)
    assert compiled(model, "eager") is model
    assert compiled(model, "aot_eager") is not model


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return timm.create_model("test_vit", img_size=64).eval()


def test_comparison_in_eager(model: torch.nn.Module) -> None:
    result = compare(model, Schedule({0: 0.5}), torch.randn(2, 3, 64, 64), rounds=2, backend="eager")
    assert isinstance(result.optimized, OptimizedModel)
    assert list(result.timing.seconds) == [EAGER, PRUNED] and result.baseline == EAGER
    report, _, table = str(Sweep((result,))).partition("\n\n")
    assert report == str(result.optimized.report())
    heads, _, row, note = table.splitlines()
    assert heads.split()[0] == "batch" and heads.endswith("speed-up over model, eager    guard keeps")
    assert row.split()[0] == "2" and row.endswith(f"  {result.kept}")
    assert note.endswith(f"device cpu, threads {torch.get_num_threads()}, rounds 2")
    content = json.loads(json.dumps(result.to_dict()))
    assert content["batch"] == 2 and content["settings"]["rounds"] == 2
    assert content["guard_keeps"] == "pruned"  # two rounds decide nothing
    assert len(content["seconds"][PRUNED]) == 2 and content["speed_up"][EAGER]["median"] == 1
    report = result.optimized.report()
    assert content["macs_ratio"] == report.macs_dense / report.macs > 1.2


def test_a_compiled_comparison_has_the_plain_model_too(model: torch.nn.Module) -> None:
    said: list[str] = []
    schedule, images = Schedule({0: 0.5}), torch.randn(2, 3, 64, 64)
    result = compare(model, schedule, images, rounds=1, backend="aot_eager", say=said.append)
    assert list(result.timing.seconds) == [COMPILED, PRUNED, EAGER] and result.baseline == COMPILED
    assert "rs_compile: capturing the model" in said and "rs_compile: compiling" in said


def test_what_cannot_be_pruned_is_refused_before_anything_is_timed(model: torch.nn.Module) -> None:
    said: list[str] = []
    with pytest.raises(CompileError, match="names block 9, but the model has 6 blocks"):
        compare(model, Schedule({9: 0.5}), torch.randn(2, 3, 64, 64), rounds=1, say=said.append)
    assert not any(COMPILED in text for text in said)
