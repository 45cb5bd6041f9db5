"""The parts of a search: shapes, cost model, drift, pictures, targets, resume file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pages_made import search_result
from torch import Tensor, nn

from rs_compile import DiffRate, PiToMe, Schedule, SearchError, ZeroTPrune
from rs_compile.drift import shown
from rs_compile.search import drift, finalists, pictures
from rs_compile.search.costs import CostModel, Counted, bisecting, fitting
from rs_compile.search.evaluation import Measured, checked
from rs_compile.search.journal import Journal
from rs_compile.search.methods import GRIDS, TOKENS, keep_ratios
from rs_compile.search.shapes import DIFFRATE, GridRamp, Profile, Ramp, Ratio
from rs_compile.search.targets import Target
from rs_compile.timing import COMPILED, PRUNED, Spread, Timing

TWELVE = [197] * 12


def test_the_table_has_the_finalists_that_were_not_chosen() -> None:
    found = search_result()
    assert [line.split()[0] for line in str(found).splitlines()[3:5]] == ["*", "prune:"]
    slow = replace(found.rows[2], speedup=Spread(1.3, 1.2, 1.4))
    tables = [str(replace(found, rows=(*found.rows[:2], row))) for row in (found.rows[2], slow)]
    [line] = set(tables[1].splitlines()) - set(tables[0].splitlines())
    assert " ".join(line.split()) == "prune: shift uniform from 1 0.650 0.05000 ± 0.00500 1.30x [1.20, 1.40]"


def test_drift_that_five_decimals_would_show_as_none() -> None:
    assert [shown(v) for v in (0.0, 0.01234, 6e-5, 1.23e-6)] == ["0.00000", "0.01234", "0.00006", "1.2e-06"]
    assert shown(2.5e-6, 4e-7) == "2.5e-06 ± 4.0e-07" and shown(0.5, 1e-7) == "0.50000 ± 0.00000"


def test_a_uniform_ramp_is_tomes() -> None:
    assert Ramp(0, 0.0).counts(13 / 197, TWELVE, range(11), True) == dict.fromkeys(range(11), 13)


def test_a_ramp_falls_evenly_and_skips_blocks_that_refuse() -> None:
    counts = Ramp(1, 0.5).counts(0.1, TWELVE, (1, 2, 5, 6), True)
    assert list(counts) == [1, 2, 5, 6]
    steps = np.diff(list(counts.values()))
    assert counts[1] == pytest.approx(1.5 * 19.7, abs=1) and counts[6] == pytest.approx(0.5 * 19.7, abs=1)
    assert all(abs(step - steps.mean()) <= 1 for step in steps)


def test_the_same_share_is_the_papers_schedule() -> None:
    counts = Ratio((0, 3, 6)).counts(0.2, TWELVE, range(11), False)
    assert counts == {0: 39, 3: 31, 6: 25}  # 197 -> 158 -> 127 -> 102, as DeiT's 20% do, cut to whole tokens


def test_diffrate_comes_out_as_published() -> None:
    counts = Profile("", DIFFRATE).counts(0.25, TWELVE, range(12), False)
    left = 197 - np.cumsum(list(counts.values()))
    assert left.tolist() == [*DIFFRATE[1:-1], 8]  # a few tokens always stay


def test_merging_takes_less_than_half_and_pruning_leaves_some() -> None:
    left = 197
    for gone in Ramp(0, 0.0).counts(1.0, TWELVE, range(11), True).values():
        assert gone < left / 2
        left -= gone
    assert sum(Ramp(0, 0.0).counts(1.0, TWELVE, range(11), False).values()) == 197 - 8


def test_late_stages_have_fewer_tokens() -> None:
    tokens = [3136, 784, 196, 196, 49, 49]
    counts = Ramp(4, 0.0).counts(1.0, tokens, (4, 5), False)
    assert counts == {4: 41}
    assert keep_ratios({4: 20, 5: 10}, tokens)[5] == pytest.approx((29 - 10.5) / 29)


def test_a_grid_keeps_multiples_of_the_strides_behind() -> None:
    counts = GridRamp(0, 0.0).counts(0.15, [56, 28, 14, 7], (0, 1, 2), False)
    rows = 56
    for i, stride in enumerate((8, 4, 2)):
        rows = rows - counts.get(i, 0)
        assert rows % stride == 0
        rows //= 2
    assert counts[0] == 8  # the paper's


def test_keep_ratios_leave_exactly_the_counts() -> None:
    counts = {0: 39, 3: 1, 6: 100}
    keep, left = keep_ratios(counts, TWELVE), 197
    for block, count in counts.items():
        schedule = TOKENS[4].make(counts, keep)
        assert left - schedule.left(left, keep[block]) == count
        left -= count


def _truth(counts: dict[int, int], dense: int = 197) -> Counted:
    """A model of 12 blocks that merges before the MLP, the last block a sixth: what a rewritten graph would say."""
    rows, left = [], dense
    for i in range(12):
        into, left = left, left - counts.get(i, 0)
        x, y = into / dense, left / dense
        share = 0.2 * x + 0.1 * x + 0.6 * y + 0.1 * x * x if i < 11 else x / 6
        rows.append((into, left, round(1e6 * share)))
    return Counted(sum(macs for _, _, macs in rows) + 12345, rows)


def test_the_cost_model_needs_one_graph_to_know_the_others() -> None:
    dense = Counted(12 * 10**6 + 12345, [(197, 197, 10**6)] * 12)
    model, shape = CostModel(dense), Ramp(0, 0.5)
    found = []
    for counts, give in fitting(
        lambda s: shape.counts(s, TWELVE, range(11), True), model, lambda _: "before the MLP", 7e6
    ):
        found.append(_truth(counts).macs)
        give(_truth(counts))
    assert len(found) <= 3 and 0 <= 7e6 - found[-1] <= 0.006 * dense.macs
    other = Ramp(3, 0.0).counts(0.08, TWELVE, range(11), True)
    assert model.predict(other, lambda _: "before the MLP") == pytest.approx(_truth(other).macs, rel=0.01)


def test_bisection_finds_the_dearest_below_the_target_past_refusals() -> None:
    costs = {8: 90, 16: 80, 24: 60, 32: 40}
    seen = []
    for counts, give in bisecting(lambda s: {0: 8 * round(4 * s)} if round(4 * s) else {}, 65):
        seen.append(counts[0])
        if counts[0] != 16:
            give(Counted(costs[counts[0]], []))
    assert 24 in seen and len(seen) <= 3


def test_cosine_and_divergence() -> None:
    a = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(drift.cosine(a, 3 * a), torch.zeros(5, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(drift.cosine(a, -a), torch.full((5,), 2.0, dtype=torch.float64))
    assert torch.allclose(drift.divergence(a, a + 1), torch.zeros(5, dtype=torch.float64), atol=1e-6)
    b = a.flip(1)
    wanted = nn.functional.kl_div(b.double().log_softmax(1), a.double().softmax(1), reduction="none").sum(1)
    assert torch.allclose(drift.divergence(b, a), wanted)


def test_outputs_choose_the_metric() -> None:
    classifier: Any = SimpleNamespace(num_classes=10)
    assert drift.choose(None, classifier, torch.randn(2, 10)).name == "KL divergence"
    assert drift.choose(None, classifier, torch.randn(2, 64)).name == "1 - cosine"
    assert drift.choose(None, classifier, {"logits": torch.randn(2, 5)}).name == "KL divergence"
    maps = drift.choose("cosine", classifier, (torch.randn(2, 8, 4, 4), torch.randn(2, 17, 8)))
    outputs = (torch.randn(2, 8, 4, 4), torch.randn(2, 17, 8))
    assert maps.of(outputs, outputs, None).abs().max() < 1e-6
    assert maps.of((None, outputs[1]), outputs, None).abs().max() < 1e-6  # one was not asked for


def test_a_metric_may_see_which_pictures_they_are() -> None:
    def wrong(outputs: Tensor, dense: Tensor, index: Tensor) -> Tensor:
        return (outputs.argmax(1) != index).float()

    chosen = drift.choose(wrong, nn.Identity(), torch.eye(3))
    assert chosen.name == "wrong"
    assert chosen.of(torch.eye(3), None, torch.tensor([0, 1, 0])).tolist() == [0, 0, 1]


def test_metrics_of_one_name_are_told_apart_by_their_code() -> None:
    known = [drift.choose(m, nn.Identity(), None).identity for m in (lambda a, b: a[:, 0], lambda a, b: a[:, 1])]
    assert known[0] != known[1]
    assert known[0] == drift.choose(lambda a, b: a[:, 0], nn.Identity(), None).identity


@pytest.mark.parametrize(("given", "text"), [(torch.zeros(3), r"metric gave \[3\] for 2"), (1.0, "metric gave float")])
def test_a_metric_that_is_not_one_number_a_picture(given: Any, text: str) -> None:
    with pytest.raises(SearchError, match=text):
        checked(given, 2)
    with pytest.raises(SearchError, match="the metric gave a number that is not finite"):
        checked(torch.tensor([float("nan"), 0.0]), 2)


def test_a_win_needs_more_than_its_standard_error() -> None:
    base = Measured(np.array([1.0, 2.0, 3.0, 4.0]))
    assert Measured(base.drift - 0.1).below(base)
    assert not Measured(base.drift + np.array([-0.5, 0.4, 0.0, 0.05])).below(base)
    assert not base.below(base)


@pytest.mark.parametrize(
    "given", [{}, {"speedup": 1.5, "macs": 0.5}, {"speedup": 1.0}, {"macs": 1.0}, {"macs": True}, {"drift": 0.0}]
)
def test_targets_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(SearchError, match=r"exactly one target|write a number"):
        Target(**given)


def test_halves_share_no_picture_and_are_the_same_again() -> None:
    given = pictures.read(torch.arange(20.0).reshape(20, 1, 1, 1), nn.Identity(), 64, 0)
    first, second = pictures.halves(given, 0)
    assert sorted([*first.index.tolist(), *second.index.tolist()]) == list(range(20))
    assert first.args[0].flatten().tolist() == first.index.tolist()
    assert torch.equal(pictures.halves(given, 0)[0].index, first.index)


def test_a_loader_gives_its_first_pictures() -> None:
    images, labels = torch.randn(20, 3, 4, 4), torch.arange(20)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)
    found = pictures.read(loader, nn.Identity(), 12, 0)
    assert torch.equal(found.args[0], images[:12])
    by_name = pictures.read([{"pixel_values": images}], nn.Identity(), 20, 0)
    assert torch.equal(by_name.kwargs["pixel_values"], images)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (torch.zeros(7, 3, 8, 8), "7 pictures are too few"),
        ([], "0 pictures are too few"),
        ([torch.zeros(8, 3, 8, 8), torch.zeros(8, 3, 9, 9)], "of different sizes"),
        ([("a", "b")], "batch of images is a str"),
        (3, "images is a int"),
        ("nowhere", "nowhere is no folder"),
    ],
)
def test_pictures_that_cannot_be(images: Any, text: str) -> None:
    with pytest.raises(SearchError, match=text):
        pictures.read(images, nn.Identity(), 64, 0)


def test_a_journal_goes_on_and_forgives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    Journal(path, {"seed": 0}).add("a", [1.0])
    with path.open("a") as file:
        file.write('{"key": "b", "val')
    again = Journal(path, {"seed": 0})
    assert again["a"] == [1.0] and "b" not in again
    again.add("c", 2)
    assert Journal(path, {"seed": 0})["c"] == 2
    with pytest.raises(SearchError, match="seed 0 there, 1 here"):
        Journal(path, {"seed": 1})
    path.write_text("{}\n")
    with pytest.raises(SearchError, match="no search's file"):
        Journal(path, {"seed": 0})


def test_published_peers_are_candidates_and_leave_what_is_asked() -> None:
    counts, of = {1: 16, 4: 9}, {m.name: m for m in TOKENS}
    keep = keep_ratios(counts, TWELVE)
    assert of["PiToMe"].make(counts, keep) == Schedule(merge=counts, by=PiToMe())
    assert of["DiffRate"].make(counts, keep) == Schedule(merge=counts, by=DiffRate(pruned={1: 6, 4: 3}))
    assert of["prune: Zero-TPrune"].make(counts, keep) == Schedule(keep, score=ZeroTPrune())


def test_random_is_among_the_methods_of_every_kind() -> None:
    assert all(any(m.draws > 1 for m in known) for known in (TOKENS, GRIDS))


@pytest.mark.parametrize(("noisy", "rounds"), [(0, 7), (1, 14), (9, 28)])
def test_rounds_that_differ_are_timed_again(noisy: int, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven steady rounds are enough; seven noisy ones are outvoted, or four times as many are all there is."""
    turns = [0]

    def interleaved(calls: dict[str, Any], count: int, **_: Any) -> Timing:
        turns[0] += 1
        pruned = [1.0 + 0.5 * (turns[0] <= noisy and i % 2) for i in range(count)]
        return Timing({COMPILED: (2.0,) * count, PRUNED: tuple(pruned)})

    monkeypatch.setattr(finalists, "interleaved", interleaved)
    found = finalists.steady({COMPILED: lambda: None, PRUNED: lambda: None}, torch.device("cpu"))
    assert [len(values) for values in found.values()] == [rounds, rounds]
