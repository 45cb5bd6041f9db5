"""guard="measure": which graph is kept, what the report says of it, and what measuring must not do."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from rs_compile import CompileError, GridPrune, OptimizedModel, Random, Schedule, TokenOutput, guard, optimize, timing
from rs_compile.timing import Timing

SCHEDULE = Schedule({0: 0.5})
TOKENS = 17  # of test_vit at 64 pixels


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=64, num_classes=10).eval()


@pytest.fixture(scope="module")
def features() -> nn.Module:
    """A model that gives its tokens [B, 17, C]."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=64, num_classes=0, global_pool="").eval()


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))


def clocked(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], tuple[float, float]]) -> list[int]:
    """Replaces the timing: both sides run once, and take by the batch size what `seconds` says (dense, pruned)."""
    timed: list[int] = []

    def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, **_: Any) -> Timing:
        batch = 0
        for call in calls.values():
            out = call()
            batch = out[0].shape[0]
        timed.append(batch)
        return Timing({name: (s,) * rounds for name, s in zip(("dense", "pruned"), seconds(batch), strict=True)})

    monkeypatch.setattr(guard, "interleaved", interleaved)
    return timed


def dense_is_faster(_: int) -> tuple[float, float]:
    return 1e-3, 2e-3


def pruned_is_faster(_: int) -> tuple[float, float]:
    return 2e-3, 1e-3


def guarded(model: nn.Module, schedule: Schedule = SCHEDULE, **options: Any) -> OptimizedModel:
    return optimize(model, schedule, backend="eager", guard="measure", **options)


def test_where_dense_is_faster_it_runs_and_the_report_says_so(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocked(monkeypatch, dense_is_faster)
    handle = guarded(model)
    torch.testing.assert_close(handle(images(2)), model(images(2)), rtol=1e-5, atol=1e-5)
    report = handle.report()
    assert [(b.tokens_in, b.tokens_out) for b in report.blocks] == [(TOKENS, TOKENS)] * 6
    assert report.macs == report.macs_dense and report.flops == report.flops_dense
    assert all(b.macs == b.macs_dense > 0 and b.attention_kernel for b in report.blocks)
    assert (
        "guard: dense 1.00 ms, pruned 2.00 ms at [2, 3, 64, 64], medians of 5 interleaved rounds; dense is kept"
        in str(report).splitlines()
    )
    assert json.loads(report.to_json())["guard"] == {
        "kept": "dense",
        "sizes": [[2, 3, 64, 64]],
        "dense_seconds": 1e-3,
        "pruned_seconds": 2e-3,
        "reason": "",
        "rounds": 5,
        "decided": True,
    }
    assert not any(n.meta.get("rs_compile") for n in handle.graph_module().graph.nodes)


def test_where_pruned_is_faster_the_result_is_as_without_a_guard(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocked(monkeypatch, pruned_is_faster)
    handle, plain = guarded(model), optimize(model, SCHEDULE, backend="eager")
    assert torch.equal(handle(images(2)), plain(images(2)))
    assert handle.report().blocks == plain.report().blocks
    assert "; pruned is kept" in str(handle.report()) and plain.report().guard is None
    assert json.loads(plain.report().to_json())["guard"] is None


def test_equal_times_keep_the_pruned_graph(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(monkeypatch, lambda _: (1e-3, 1e-3))
    handle = guarded(model)
    handle(images(1))
    verdict = handle.report().guard
    assert verdict is not None and verdict.kept == "pruned" and not verdict.decided


def noisy(monkeypatch: pytest.MonkeyPatch, rounds: Callable[[int], tuple[float, float]]) -> None:
    """Replaces the clock alone: round i, from 0 on, takes what `rounds` says, in seconds (dense, pruned)."""
    turns: dict[int, int] = {}  # by call, the dense one is made first

    def seconds(call: Callable[[], Any], repeats: int, _: Any) -> float:
        call()
        side = list(turns).index(id(call)) if id(call) in turns else len(turns)
        turns[id(call)] = turns.get(id(call), -2) + 1  # two calls before the rounds find how often to repeat
        return rounds(max(0, turns[id(call)] - 1))[side]

    monkeypatch.setattr(timing, "_seconds", seconds)


def test_a_difference_inside_the_noise_is_measured_on_and_is_no_verdict(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense has the lower median, by two of five rounds' noise: 3.3 ms against 3.5 ms was kept for good."""
    noisy(monkeypatch, lambda i: [(3.3e-3, 3.5e-3), (3.6e-3, 3.4e-3), (3.2e-3, 3.5e-3), (3.5e-3, 3.4e-3)][i % 4])
    handle = guarded(model)
    plain = optimize(model, SCHEDULE, backend="eager")
    assert torch.equal(handle(images(2)), plain(images(2)))
    verdict = handle.report().guard
    assert verdict is not None and (verdict.kept, verdict.decided, verdict.rounds) == ("pruned", False, 30)
    assert verdict.dense_seconds is not None and verdict.pruned_seconds is not None
    assert verdict.dense_seconds < verdict.pruned_seconds
    assert str(handle.report()).endswith(
        "ms at [2, 3, 64, 64], medians of 30 interleaved rounds; the difference may be noise, so pruned is kept "
        "undecided; on a quiet machine remeasure() has the next call time both again"
    )


def test_measuring_on_finds_a_small_difference(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense wins four of five rounds: 4 of 5 and 8 of 10 may be chance, 12 of 15 are so once in 28 times."""
    noisy(monkeypatch, lambda i: (3e-3, 3.2e-3) if i % 5 else (3e-3, 2.9e-3))
    handle = guarded(model)
    torch.testing.assert_close(handle(images(2)), model(images(2)), rtol=1e-5, atol=1e-5)
    verdict = handle.report().guard
    assert verdict is not None and (verdict.kept, verdict.decided, verdict.rounds) == ("dense", True, 15)


def test_slow_calls_are_not_measured_on_for_minutes(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy(monkeypatch, lambda i: (3.304, 3.464) if i % 2 else (3.4, 3.3))
    handle = guarded(model)
    handle(images(1))
    verdict = handle.report().guard
    assert verdict is not None and (verdict.decided, verdict.rounds) == (False, 5)


@pytest.mark.parametrize(
    "won, of, decided", [(5, 5, True), (4, 5, False), (8, 10, False), (9, 10, True), (12, 15, True)]
)
def test_how_many_rounds_are_a_verdict(won: int, of: int, decided: bool) -> None:
    """A fair coin's odds, two-sided, against 1/16: 0.0625 for 5 of 5, 0.109 for 8 of 10, 0.021 for 9 of 10."""
    times = Timing({"dense": (2.0,) * of, "pruned": (1.0,) * won + (3.0,) * (of - won)})
    assert guard.faster(times) == ("pruned" if decided else None)


def test_remeasure_times_the_next_call_of_each_size_on_the_same_capture(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed, said = clocked(monkeypatch, dense_is_faster), []
    handle = guarded(model, progress=said.append)
    handle(images(1)), handle(images(2))
    clocked(monkeypatch, pruned_is_faster)
    handle(images(1))
    first = handle.report().guard
    assert first is not None and first.kept == "dense"
    again = clocked(monkeypatch, pruned_is_faster)
    handle.remeasure()
    plain = optimize(model, SCHEDULE, backend="eager")
    for batch in (2, 1, 2):
        assert torch.equal(handle(images(batch)), plain(images(batch)))
        verdict = handle.report().guard
        assert verdict is not None and verdict.kept == "pruned"
    assert (timed, again) == ([1, 2], [2, 1]) and said.count("capturing the model") == 1


def test_remeasure_without_a_guard_is_refused(model: nn.Module) -> None:
    with pytest.raises(CompileError, match=r"nothing is measured without a guard; optimize\(model, schedule, guard="):
        optimize(model, SCHEDULE, backend="eager").remeasure()


def test_each_size_is_decided_once_by_itself_on_one_capture(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = clocked(monkeypatch, lambda batch: dense_is_faster(batch) if batch < 3 else pruned_is_faster(batch))
    said: list[str] = []
    handle, plain = guarded(model, progress=said.append), optimize(model, SCHEDULE, backend="eager")
    kept = {}
    for batch in (1, 4, 1, 2, 4):
        out = handle(images(batch))
        verdict = handle.report().guard
        assert verdict is not None and verdict.sizes == ((batch, 3, 64, 64),)
        kept[batch] = verdict.kept
        expected = model(images(batch)) if batch < 3 else plain(images(batch))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert kept == {1: "dense", 4: "pruned", 2: "dense"}
    assert timed == [1, 4, 2]
    assert said.count("capturing the model") == 1


def test_a_compact_output_that_stays_dense_has_every_token_kept(
    features: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocked(monkeypatch, dense_is_faster)
    handle = guarded(features, token_outputs="compact")
    out = handle(images(3))
    assert isinstance(out, TokenOutput)
    torch.testing.assert_close(out.tokens, features(images(3)), rtol=1e-5, atol=1e-5)
    assert out.kept.dtype == torch.int64 and torch.equal(out.kept, torch.arange(TOKENS).expand(3, TOKENS))
    out.kept.zero_()  # the caller's own, the next call's positions are right
    assert handle(images(3)).kept[2, -1] == TOKENS - 1


def test_a_compact_output_of_two_prunings_stays_dense(features: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(monkeypatch, dense_is_faster)
    out = guarded(features, Schedule({0: 0.7, 2: 0.5}), token_outputs="compact")(images(2))
    assert torch.equal(out.kept, torch.arange(TOKENS).expand(2, TOKENS))


def test_rows_and_columns_of_a_cnn_stay_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(monkeypatch, dense_is_faster)
    cnn = timm.create_model("test_resnet", num_classes=10).eval()
    handle = guarded(cnn, Schedule(grid={0: GridPrune(4, 4)}))
    torch.testing.assert_close(handle(images(2)), cnn(images(2)), rtol=1e-5, atol=1e-5)
    report = handle.report()
    assert report.stages and all(s.grid_in == s.grid_out and s.macs == s.macs_dense for s in report.stages)


def test_merging_is_not_reported_of_a_dense_graph(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, text in ((dense_is_faster, ""), (pruned_is_faster, "merging: stream")):
        clocked(monkeypatch, seconds)
        handle = guarded(model, Schedule(merge={0: 4}))
        handle(images(1))
        assert handle.report().merging.startswith(text) and bool(handle.report().merging) == bool(text)


def test_random_numbers_are_drawn_as_if_nothing_were_timed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(monkeypatch, pruned_is_faster)
    schedule = Schedule({0: 0.5}, score=Random())
    torch.manual_seed(5)
    out, after = guarded(model, schedule)(images(2)), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(out, optimize(model, schedule, backend="eager")(images(2)))
    assert torch.equal(after, torch.rand(1))


def test_measuring_leaves_no_gradients(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(monkeypatch, pruned_is_faster)
    x = images(2).requires_grad_()
    out = guarded(model)(x)
    assert x.grad is None and all(p.grad is None for p in model.parameters())
    (grad,) = torch.autograd.grad(out.sum(), x)
    (expected,) = torch.autograd.grad(optimize(model, SCHEDULE, backend="eager")(x).sum(), x)
    assert torch.equal(grad, expected)


def test_train_mode_is_not_measured_and_eval_mode_still_is(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = clocked(monkeypatch, dense_is_faster)
    model = timm.create_model("test_vit", img_size=64, num_classes=10, proj_drop_rate=0.5)
    handle = guarded(model).train()
    handle(images(2))
    verdict = handle.report().guard
    assert verdict is not None and verdict.kept == "pruned" and verdict.dense_seconds is None and timed == []
    assert (
        "guard: nothing timed, the pruned graph runs: in train mode a run may change the model (a count, a moving "
        "average); measured in eval mode only" in str(handle.report())
    )
    handle.eval()
    handle(images(2))
    assert timed == [2] and "dense is kept" in str(handle.report())


def test_the_norm_whose_statistics_would_move_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = clocked(monkeypatch, dense_is_faster)
    cnn = timm.create_model("test_resnet", num_classes=10)
    handle = guarded(cnn, Schedule(grid={0: GridPrune(4, 4)})).train()
    cnn.conv1.eval(), cnn.bn1.eval()  # move nothing: the next one is the first that does
    handle(images(2))
    reason = "in train mode a run moves the running statistics of layer1.0.bn1"
    said = str(handle.report())
    assert f"guard: nothing timed, the pruned graph runs: {reason}; measured in eval mode only" in said
    assert f"not compared with the model: {reason}; compared in eval mode only" in said and timed == []


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.inner(x)


def test_a_model_that_writes_into_a_buffer_is_not_measured(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = clocked(monkeypatch, dense_is_faster)
    counting = Counting(model).eval()
    handle = guarded(counting)
    handle(images(2))
    assert timed == [] and counting.calls == 1
    verdict = handle.report().guard
    assert verdict is not None and verdict.reason.startswith("the model writes into ")
    assert verdict.reason.endswith(", and every run would do so again")


def test_a_schedule_that_leaves_nothing_out_is_not_measured(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = clocked(monkeypatch, dense_is_faster)
    handle = guarded(model, Schedule({0: 1.0}))
    handle(images(1))
    assert timed == [] and "the schedule leaves nothing out" in str(handle.report())


def test_an_unknown_guard_is_refused(model: nn.Module) -> None:
    wrong: Any = "always"
    with pytest.raises(ValueError, match="guard is 'always'; write \"measure\", or leave it out"):
        optimize(model, SCHEDULE, guard=wrong)


def test_threads_decide_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = clocked(monkeypatch, dense_is_faster)
    handle, out = guarded(model), [torch.empty(0)] * 3

    def call(i: int) -> None:
        out[i] = handle(images(2))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert timed == [2] and torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


@pytest.mark.parametrize("seconds", [dense_is_faster, pruned_is_faster])
def test_the_losers_code_is_not_kept(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], tuple[float, float]]
) -> None:
    clocked(monkeypatch, seconds)
    made: list[weakref.ref[Any]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            return gm(*args)

        made.append(weakref.ref(run))
        return run

    handle = optimize(model, SCHEDULE, backend=backend, guard="measure")
    with torch.no_grad():
        out = handle(images(2))
        gc.collect()
        alive = [ref() is not None for ref in made]
        assert alive == ([True, False] if seconds is dense_is_faster else [False, True])
        assert torch.equal(handle(images(2)), out)


@pytest.mark.slow
@pytest.mark.inductor
def test_real_times_decide_for_real() -> None:
    model = timm.create_model("test_vit", img_size=64, num_classes=10, depth=2).eval()
    handle = optimize(model, SCHEDULE, guard="measure")
    with torch.no_grad():
        out = handle(images(2))
        verdict = handle.report().guard
        assert verdict is not None and verdict.dense_seconds is not None and verdict.pruned_seconds is not None
        assert min(verdict.dense_seconds, verdict.pruned_seconds) > 0
        lower = "dense" if verdict.dense_seconds < verdict.pruned_seconds else "pruned"
        assert verdict.kept == (lower if verdict.decided else "pruned")
        expected = model if verdict.kept == "dense" else optimize(model, SCHEDULE, backend="eager")
        torch.testing.assert_close(out, expected(images(2)), rtol=1e-4, atol=1e-4)
        assert torch.equal(handle(images(2)), out)
