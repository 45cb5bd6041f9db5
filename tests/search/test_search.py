"""Searches from end to end, on a tiny ViT, uncompiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import rs_compile
from rs_compile import SearchError, SearchResult, cli
from rs_compile.search.evaluation import Evaluator
from rs_compile.search.finalists import Stopwatch
from rs_compile.search.methods import TOKENS
from rs_compile.timing import COMPILED, PRUNED

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=0, init_values=0.5
    ).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def find(model: nn.Module, images: Any, **more: Any) -> SearchResult:
    options: dict[str, Any] = {"backend": "eager", "methods": ["prune: shift"], "progress": False}
    return rs_compile.search(model, images, **options | more)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search") / "found.jsonl"


@pytest.fixture(scope="module")
def result(model: nn.Module, images: Tensor, resumed: Path) -> SearchResult:
    return find(model, images, macs=0.6, resume=resumed)


def test_what_is_found_costs_what_was_asked_and_is_measured_right(
    result: SearchResult, model: nn.Module, images: Tensor
) -> None:
    winner = result.winner
    assert result.schedule.keep
    assert rs_compile.plan(model, result.schedule, images[:2]).macs == winner.macs
    assert 0.58 < winner.macs / result.macs_dense <= 0.6
    fast = rs_compile.optimize(model, result.schedule, backend="eager")
    searched, held = halves(images)
    with torch.no_grad():
        for half, found in ((searched, winner.drift), (held, winner.held_drift)):
            apart = 1 - torch.cosine_similarity(fast(half).double(), model(half).double())
            assert float(apart.mean()) == pytest.approx(found, rel=1e-3, abs=1e-7)
    assert winner.drift == min(r.drift for r in result.rows if r.method == "prune: shift" and r.drift is not None)
    assert winner.speedup is not None


def halves(images: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:6]], images[order[6:]]


@pytest.mark.slow
def test_published_peers_are_candidates(model: nn.Module, images: Tensor) -> None:
    peers = ["PiToMe", "DiffRate", "prune: Zero-TPrune"]
    found = find(model, images, macs=0.75, methods=peers)
    tried = {r.method: r for r in found.best if r.method in peers}
    assert set(tried) == set(peers)
    assert all(r.macs <= 0.75 * found.macs_dense and r.drift > 0 for r in tried.values())
    by = tried["DiffRate"].schedule.by
    assert isinstance(by, rs_compile.DiffRate) and sum(by.pruned.values()) > 0


def test_random_is_in_the_table_and_the_verdict_names_it(result: SearchResult) -> None:
    random = [r for r in result.best if r.method == "prune: random"]
    assert random and random[0].draws == 3
    worse = (random[0].held_drift or 0) < (result.winner.held_drift or 0)
    assert not worse or "NO BETTER THAN RANDOM" in result.verdict
    assert result.verdict in str(result) and "held out" in str(result)


def test_the_front_is_what_nothing_beats(result: SearchResult) -> None:
    ran = [r for r in result.rows if r.drift is not None]
    assert {r for r in ran if not any(o.macs <= r.macs and o.drift < r.drift for o in ran)} <= set(result.front)
    assert [r.macs for r in result.front] == sorted(r.macs for r in result.front)


def test_json_and_plot(result: SearchResult, tmp_path: Path) -> None:
    content = json.loads(result.to_json())
    assert len(content["rows"]) == len(result.rows)
    assert rs_compile.Schedule.from_json(json.dumps(content["schedule"])) == result.schedule
    result.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SearchError, match=r"is no \.png"):
        result.plot(tmp_path / "front.txt")


def test_a_resumed_search_runs_nothing_and_finds_the_same(
    result: SearchResult, model: nn.Module, images: Tensor, resumed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any) -> None:
        raise AssertionError("ran again")

    monkeypatch.setattr(Evaluator, "_run", run)
    assert find(model, images, macs=0.6, resume=resumed).to_json() == result.to_json()


def test_a_schedule_file_goes_into_optimize(
    result: SearchResult, model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(result.schedule.to_json())
    with torch.no_grad():
        wanted = rs_compile.optimize(model, result.schedule, backend="eager")(images)
        for given in (path, str(path)):
            assert torch.equal(rs_compile.optimize(model, given, backend="eager")(images), wanted)
    with pytest.raises(rs_compile.ScheduleError, match=r"no schedule can be read from .*nothing\.json"):
        rs_compile.optimize(model, str(tmp_path / "nothing.json"))


def test_drift_is_kept_and_the_metric_is_the_users(model: nn.Module, images: Tensor) -> None:
    seen: list[int] = []

    def apart(outputs: Tensor, dense: Tensor) -> Tensor:
        seen.append(len(outputs))
        return (outputs - dense).norm(dim=1) / dense.norm(dim=1)

    found = find(model, images, drift=0.2, metric=apart, held_out=images[:8])
    assert found.metric == "apart" and found.winner.drift is not None and 0.05 < found.winner.drift <= 0.2
    assert found.searched == 12 and found.held == 8 and set(seen) == {12, 8}


def test_a_speed_up_is_met_in_measured_time(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(watch: Stopwatch, schedule: rs_compile.Schedule) -> dict[str, list[float]]:
        # as if a graph were slower than its arithmetic by a tenth: the counts have to follow
        counted = watch.evaluator.count(schedule)
        assert counted is not None
        return {COMPILED: [1.0] * 7, PRUNED: [1.1 * counted.macs / dense] * 7}

    dense = rs_compile.plan(model, {}, images[:2]).macs
    monkeypatch.setattr(Stopwatch, "_time", seconds)
    found = find(model, images, speedup=1.6)
    assert found.winner.speedup is not None and 1.6 <= found.winner.speedup.median < 1.75
    assert found.winner.macs < dense / (1.1 * 1.6)


def method(schedule: rs_compile.Schedule) -> str:
    return type(schedule.by).__name__ if schedule.merge else "prune"


def test_each_method_is_compared_at_the_arithmetic_that_it_needs(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The method of least drift at equal arithmetic is the slowest: it needs to lose more than the others do."""
    dense = rs_compile.plan(model, {}, images[:2]).macs
    slow: dict[str, float] = {}  # times the arithmetic

    def seconds(watch: Stopwatch, schedule: rs_compile.Schedule) -> dict[str, list[float]]:
        counted = watch.evaluator.count(schedule)
        assert counted is not None
        time = slow.setdefault(method(schedule), 1.0 if slow else 1.3) * counted.macs / dense
        return {COMPILED: [1.0] * 7, PRUNED: [time] * 7}

    monkeypatch.setattr(Stopwatch, "_time", seconds)
    found = find(model, images, speedup=1.3, methods=["Ward", "stream", "prune: shift"])
    assert len(slow) == 2  # the next best was timed as well, and not only the slow one with fewer tokens
    assert found.winner.speedup is not None and found.winner.speedup.median >= 1.3
    assert found.winner.drift is not None
    nearer = [r for r in found.rows if r.drift is not None and r.drift < found.winner.drift]
    assert nearer and all(slow[method(r.schedule)] * r.macs > dense / 1.3 for r in nearer)


def test_what_nothing_reaches_names_the_nearest(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(SearchError, match=r"nothing reaches 0\.01 of .*the nearest is 0\.[0-9]+ of the dense"):
        find(model, images, macs=0.01)
    with pytest.raises(SearchError, match=r"nothing reaches 90 times faster: the nearest"):
        find(model, images, speedup=90)


def test_pictures_and_models_that_do_not_fit(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(SearchError, match=r"does not run on pictures of \[3, 16, 16\]"):
        find(model, images[:, :, :16, :16], macs=0.7)
    with pytest.raises(SearchError, match=r"no method 'tome'.*'ToMe'"):
        find(model, images, macs=0.7, methods=["tome"])
    with pytest.raises(SearchError, match="nothing can leave this model"):
        find(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)).eval(), images, macs=0.7)
    training = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(SearchError, match=r"call model\.eval"):
        find(training, images, macs=0.7)


def test_too_few_tokens(images: Tensor) -> None:
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0}
    model = timm.models.VisionTransformer(**options).eval()
    with pytest.raises(SearchError, match=r"(?s)refuses every method.*\n  Ward: of 5 tokens none can leave"):
        find(model, images, macs=0.9, methods=["Ward", "prune: shift", "prune by shift, then Ward"])


def test_one_site_of_prune_then_ward_prunes() -> None:
    [method] = [m for m in TOKENS if m.name == "prune by shift, then Ward"]
    assert method.make({2: 5}, {2: 0.5}) == rs_compile.Schedule({2: 0.5})
    both = method.make({2: 5, 3: 4}, {2: 0.5, 3: 0.5})
    assert both.keep == {2: 0.5} and both.merge == {3: 4}


def test_rows_and_columns_of_a_cnn(images: Tensor) -> None:
    torch.manual_seed(0)
    cnn = timm.create_model("resnet10t", num_classes=5).eval()
    pictures = torch.randn(8, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    found = find(cnn, pictures, macs=0.8, methods=["rows and columns: shift"])
    assert found.schedule.grid and found.metric == "KL divergence"
    assert found.winner.macs <= 0.8 * found.macs_dense
    assert found.winner.agreement is not None


def test_the_command_writes_the_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for i in range(8):
        noise = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / f"{i}.png")
    out = tmp_path / "schedule.json"
    weights = tmp_path / "weights.pt"
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), weights)
    argv = ["search", "test_vit", "--num-classes", "3", "--checkpoint", str(weights)]
    argv += ["--images", str(tmp_path), "--macs", "0.6"]
    argv += ["--methods", "prune: shift", "--backend", "eager", "--limit", "8", "--batch-size", "4"]
    assert cli.main([*argv, "-o", str(tmp_path / "schedule.txt")]) == 2
    assert "give a .json file" in capsys.readouterr().err
    assert cli.main([*argv, "-o", str(out)]) == 0
    assert "prune: random" in capsys.readouterr().out
    assert rs_compile.Schedule.of(str(out)).prunes
