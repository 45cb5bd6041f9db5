"""What a cut does to outputs, to values from before it, and what it refuses."""

from __future__ import annotations

from typing import Any

import oracle
import oracle_cnn
import pytest
import torch
from generated_cnn import Block, Config, Norm
from oracle_cnn import Cut
from torch import Tensor, nn

import rs_compile
from passes.sites.grid_prune import GridPrune
from passes.sites.grid_select import spread
from rs_compile import Lowest, MeanAttention, Random, Schedule, Shift

CONFIG = Config("basic", (1, 2), (2, 1), 4, (12, 9), 3, "batch", "mean", False, 0)


class Net(nn.Module):
    """Two stages of 12 x 9 and 6 x 5 cells; what it returns is `head(image, first map, second map)`."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one = nn.Sequential(Block(CONFIG, 4, 4, 1), Block(CONFIG, 4, 4, 1))
        self.two = Block(CONFIG, 4, 8, 2)
        self.norm = Norm(4)
        self.wide = nn.Conv2d(4, 4, 3, padding=1)
        self.narrow = nn.Conv2d(8, 2, 3, padding=1)
        self.flat = nn.Linear(8 * 6 * 5, 2)
        self.head = head

    def forward(self, x: Tensor) -> Any:
        a = self.one(self.stem(x))
        return self.head(self, x, a, self.two(a))


def net(head: Any) -> Net:
    return Net(head).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 12, 9, generator=torch.Generator().manual_seed(0))


def run(model: nn.Module, *grid: GridPrune, x: Tensor | None = None, **options: Any) -> Any:
    schedule = Schedule(grid=dict(enumerate(grid)))
    with torch.no_grad():
        return rs_compile.optimize(model, schedule, **{"backend": "eager", **options})(images() if x is None else x)


def kept(model: Net, cut: Cut) -> list[Tensor]:
    """For each sample row and column [2, H', W'] of the cells that stay after the first stage."""
    with torch.no_grad():
        entry = model.stem(images())
        score = oracle_cnn.distance(model.one(entry), entry)
    return [torch.tensor(oracle_cnn.cells(s, cut)[0]).permute(2, 0, 1) for s in score]


LINE, TOKEN = Cut(4, 3), Cut(4, 3, "token")


@pytest.mark.parametrize("cut", [LINE, TOKEN], ids=["line", "token"])
@torch.no_grad()
def test_feature_maps_come_back_at_full_size(cut: Cut) -> None:
    """The stage's own output as it was; cell by cell functions of it too; later maps from the nearest cells."""
    model = net(lambda m, x, a, b: [a, m.norm(a), m.wide(a), b])
    own, normed, wide, later = run(model, GridPrune(**vars(cut)))
    dense = model(images())
    assert torch.equal(own, dense[0]) and torch.equal(normed, dense[1])
    where = torch.stack(kept(model, cut))
    rows, columns = (where[:, 0], where[:, 1]) if cut.mode == "token" else (where[:, 0, :, :1], where[:, 1, :1])
    short = torch.stack([dense[0][i][:, r, c] for i, (r, c) in enumerate(where)])
    back = spread(model.wide(short), rows, columns, (12, 9), (12, 9), (1, 1), (0.0, 0.0))
    oracle.assert_close(wide, back, 1e-5)
    back = spread(model.two(short), rows, columns, (12, 9), (6, 5), (2, 2), (0.0, 0.0))
    oracle.assert_close(later, back, 1e-5)


def padded_as_tensorflow(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution of stride 2 that gives (size / 2) rows and columns, rounded up."""
    h, w = (max((-(-n // 2) - 1) * 2 + weight.shape[2] - n, 0) for n in x.shape[2:])
    return nn.functional.conv2d(nn.functional.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2)), weight, stride=2)


HEADS: dict[str, tuple[Any, list[nn.Module]]] = {
    "zero padding": (lambda m, a: m.more(a), [nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3)]),
    "uneven zero padding": (lambda m, a: m.more(a), [nn.ZeroPad2d((0, 1, 0, 2)), nn.Conv2d(4, 4, 3, stride=2)]),
    "reflected": (lambda m, a: m.more(a), [nn.ReflectionPad2d((1, 2, 0, 1)), nn.Tanh()]),
    "cropped": (lambda m, a: m.more(a), [nn.ZeroPad2d((-1, 1, 0, -1)), nn.Tanh()]),
    "circular": (lambda m, a: m.more(a), [nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")]),
    "as tensorflow": (lambda m, a: padded_as_tensorflow(a, m.wide.weight), []),
    "as tensorflow, stride 1": (lambda m, a: nn.functional.conv2d(nn.functional.pad(a, [1] * 4), m.wide.weight), []),
    "cells in one dimension": (lambda m, a: m.more(a.flatten(2).transpose(1, 2)).mean(1), [nn.LayerNorm(4), nn.GELU()]),
    "sizes written": (lambda m, a: a.view(len(a), 4, a.shape[2] * a.shape[3]).tanh().amax(2), []),
    "fixed grid": (lambda m, a: m.more(a), [nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(24, 5)]),
    "fixed grid of maxima": (lambda m, a: m.more(a), [nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, 5)]),
    "moved about": (
        lambda m, a: (
            torch.stack([a.movedim(1, 3).mT, a.permute(0, 2, 1, 3).flip(2)], 1).squeeze(1)[:, 1].transpose(1, 2)
        ),
        [],
    ),
    "a dimension more": (lambda m, a: a.flatten(2).unsqueeze(1)[:, 0].roll(1, 1).unflatten(2, a.shape[2:]), []),
    "a gate of each row": (lambda m, a: a * a.mean(3, keepdim=True).sigmoid() * a[:, [2, 0, 1, 3]], []),
    "one window": (lambda m, a: m.more(a).reshape(a.shape[:2]), [nn.AvgPool2d(20, ceil_mode=True, padding=4)]),
}


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_what_the_model_itself_gives_on_the_smaller_map(name: str) -> None:
    head, more = HEADS[name]

    def pooled(x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.dim() == 4 else x

    model = net(lambda m, x, a, b: pooled(head(m, a)))
    model.more = nn.Sequential(*more)
    cut = Cut(4, 2)
    got = run(model, GridPrune(4, 2))
    dense = model.one(model.stem(images()))
    short = torch.stack([dense[i][:, r, c] for i, (r, c) in enumerate(kept(model, cut))])
    assert short.shape == (2, 4, 8, 7)
    oracle.assert_close(got, pooled(head(model, short)), 1e-5)
    assert not torch.allclose(got, model(images()))


def test_padding_that_another_count_changes() -> None:
    model = net(lambda m, x, a, b: padded_as_tensorflow(a, m.wide.weight).mean((2, 3)))
    with pytest.raises(rs_compile.Refusal, match=r"pads the map by amounts that may be others") as e:
        run(model, GridPrune(4, 3))
    assert "from which 4 rows and 3 columns are gone" in str(e.value)
    assert "way out: let a multiple of 2 rows and of 2 columns leave" in str(e.value)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (
            lambda m, x, a, b: nn.functional.adaptive_avg_pool2d(a, (6, 4)).mean((2, 3)),
            "pools the map to 6 x 4, a size",
        ),
        (lambda m, x, a, b: m.keeps(a).mean((2, 3)), "pools the map to 2 x 9, a size that the model may compute"),
        (
            lambda m, x, a, b: (a + nn.functional.interpolate(m.two_cells(a), size=a.shape[2:])).mean((2, 3)),
            r"aten\.upsample_nearest2d.*resizes what was pooled to a fixed grid to a size that may be the map's",
        ),
        (
            lambda m, x, a, b: (a + m.again(m.two_cells(a)).view(-1, 4, 12, 9)).mean((2, 3)),
            "meets what was pooled to a fixed grid and given rows and columns again",
        ),
    ],
)
def test_sizes_that_may_be_computed_from_the_map(head: Any, words: str) -> None:
    model = net(head)
    model.keeps, model.two_cells = nn.AdaptiveAvgPool2d((2, None)), nn.AdaptiveAvgPool2d(2)
    model.again = nn.Sequential(nn.Flatten(), nn.Linear(16, 4 * 12 * 9))
    assert model(images()).shape == (2, 4)
    with pytest.raises(rs_compile.Refusal, match=words):
        run(model, GridPrune(4, 3))


@torch.no_grad()
def test_two_cuts_are_undone_one_after_the_other() -> None:
    model = net(lambda m, x, a, b: [b, b * 2, m.narrow(b)])
    first, twice, later = run(model, GridPrune(4, 3), GridPrune(1, 1, "token"))
    assert [tuple(v.shape) for v in (first, twice, later)] == [tuple(v.shape) for v in model(images())]
    alone = run(model, GridPrune(4, 3))
    assert torch.equal(first, alone[0]) and torch.equal(twice, alone[1])  # a stage's own cut does not touch them
    assert not torch.equal(later, alone[2])


@torch.no_grad()
def test_a_value_from_before_the_cut_is_cut_alike() -> None:
    model = net(lambda m, x, a, b: (m.wide(a) + m.stem(x)).mean((2, 3)))
    got = run(model, GridPrune(4, 3, "token"))
    for i, (r, c) in enumerate(kept(model, TOKEN)):
        a = model.one(model.stem(images()[i : i + 1]))[:, :, r, c]
        oracle.assert_close(got[i : i + 1], (model.wide(a) + model.stem(images())[i][:, r, c]).mean((2, 3)), 1e-5)


SAMPLES: dict[str, tuple[Any, str]] = {
    "some": (lambda m, x, a, b: m.wide(a[:1]), "an output has other samples than the map that was cut"),
    "half of them": (lambda m, x, a, b: m.wide(a).chunk(2)[1], "an output has other samples"),
    "one for all": (lambda m, x, a, b: m.wide(a[:1] + a), "an output has other samples"),
    "as many, in two parts": (
        lambda m, x, a, b: m.wide(torch.cat([a, a]).view(2, *a.shape)[0]),
        "other samples",
    ),
    "twice": (lambda m, x, a, b: m.wide(torch.cat([a, a])), "an output has other samples"),
    "where channels are": (lambda m, x, a, b: m.wide(a).transpose(0, 1), "an output has other samples"),
    "one with all of before": (lambda m, x, a, b: (a[:1] + m.stem(x)).mean((2, 3)), "of which it has not every sample"),
    "joined with those of before": (lambda m, x, a, b: torch.cat([a, m.stem(x)]).mean((2, 3)), "joins samples of a"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_taken_and_joined_are_not_given_back_as_those_of_the_map(name: str) -> None:
    head, words = SAMPLES[name]
    model = net(head)
    assert isinstance(model(images()), Tensor)
    with pytest.raises(rs_compile.Refusal, match=words):
        run(model, GridPrune(4, 3))


@torch.no_grad()
def test_samples_taken_and_pooled() -> None:
    model = net(lambda m, x, a, b: torch.cat([m.wide(a)[1:], a[:1]]).mean((2, 3)))
    got = run(model, GridPrune(4, 3))
    r, c = torch.stack(kept(model, LINE)).unbind(1)
    a = model.one(model.stem(images()))
    first, second = (a[i : i + 1][:, :, r[i], c[i]] for i in (0, 1))
    oracle.assert_close(got, torch.cat([model.wide(second), first]).mean((2, 3)), 1e-5)


def test_a_head_of_fixed_size_refuses_with_its_line() -> None:
    model = net(lambda m, x, a, b: m.flat(b.flatten(1)))
    with pytest.raises(rs_compile.Refusal, match=r"reshapes the map of 6 x 5 to \['batch', 240\], a fixed grid") as e:
        run(model, GridPrune(1, 0))
    assert "test_grid_cut.py" in str(e.value) and "self.two(a)" in str(e.value) and "way out" in str(e.value)
    explanation = rs_compile.explain(model, images())
    assert [s.prunable for s in explanation.stages] == [False, False]
    assert "a fixed grid" in explanation.stages[0].reason and "12 x 9" in str(explanation)


def test_a_position_embedding_is_cut_alike_and_of_another_grid_refused() -> None:
    table = nn.Parameter(torch.randn(1, 4, 12, 9))
    model = net(lambda m, x, a, b: (a + table).mean((2, 3)))
    assert run(model, GridPrune(4, 3)).shape == (2, 4)
    later = nn.Parameter(torch.randn(1, 8, 6, 5))
    with pytest.raises(rs_compile.Refusal, match=r"aten\.add\.Tensor.*meets a value from before the cut"):
        run(net(lambda m, x, a, b: (b + later).mean((2, 3))), GridPrune(4, 3))


def test_a_single_row_does_not_broadcast() -> None:
    """Both maps have two rows in the model; on the smaller grid one has a single one."""
    model = net(lambda m, x, a, b: (b[:, :, ::3] * nn.functional.avg_pool2d(b, (3, 1))).mean((2, 3)))
    assert model(images()).shape == (2, 8)
    with pytest.raises(rs_compile.Refusal, match=r"maps of different sizes meet[\s\S]*let a multiple of 6 rows and"):
        run(model, GridPrune(4, 0))


def test_a_kernel_larger_than_what_is_left() -> None:
    model = net(lambda m, x, a, b: nn.functional.conv2d(b, torch.ones(1, 8, 5, 5)).mean((2, 3)))
    with pytest.raises(rs_compile.Refusal, match=r"does not run on the smaller grid: .*Kernel size"):
        run(model, GridPrune(6, 0))


def pooled() -> Net:
    return net(lambda m, x, a, b: b.mean((2, 3)))


def test_more_rows_than_there_are() -> None:
    with pytest.raises(rs_compile.CompileError, match="12 rows are to leave stage 0, which has 12 rows; write"):
        run(pooled(), GridPrune(12, 0))
    with pytest.raises(rs_compile.CompileError, match="9 columns are to leave stage 0, which has 9 columns"):
        run(pooled(), GridPrune(0, 9))
    with pytest.raises(rs_compile.CompileError, match="4 rows are to leave stage 1, which has 4 rows"):
        run(pooled(), GridPrune(4, 0), GridPrune(4, 0))


def test_a_stage_that_is_not_there() -> None:
    with pytest.raises(rs_compile.CompileError, match="names stage 2, but the model has 2 stages, 0 to 1"):
        run(pooled(), GridPrune(), GridPrune(), GridPrune(1, 1))


def test_a_grid_prune_asked_of_a_transformer_and_the_reverse() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    with pytest.raises(rs_compile.Refusal, match=r"no stage of residual convolutions.*\n.*Schedule\(keep=") as e:
        run(layer.eval(), GridPrune(1, 1), x=torch.randn(2, 6, 8))
    assert "residual" in str(e.value)
    with pytest.raises(rs_compile.Refusal, match=r"no residual MLP branch[\s\S]*Schedule\(grid=\{stage: GridPrune"):
        rs_compile.optimize(pooled(), {0: 0.5}, backend="eager")(images())


def test_scores_that_no_stage_has() -> None:
    grid = {0: GridPrune(1, 1)}
    with pytest.raises(rs_compile.ScheduleError, match="a stage has no tokens or attention to score"):
        rs_compile.optimize(pooled(), Schedule(grid=grid, score=MeanAttention()), backend="eager")(images())
    with pytest.raises(rs_compile.ScheduleError, match="protected names tokens"):
        rs_compile.optimize(pooled(), Schedule(grid=grid, protected=(1,)), backend="eager")(images())
    with pytest.raises(rs_compile.Refusal, match="stage 1 has one block, whose output is the stage's"):
        run(pooled(), GridPrune(1, 1), GridPrune(1, 1, against="first-block"))


def test_short_maps_are_not_given_out() -> None:
    with pytest.raises(rs_compile.Refusal, match=r'an output of the model is a map[\s\S]*token_outputs="restore"'):
        run(net(lambda m, x, a, b: b), GridPrune(1, 1), token_outputs="compact")
    assert run(pooled(), GridPrune(1, 1), token_outputs="compact").shape == (2, 8)


def test_baselines_keep_other_lines() -> None:
    grid = {0: GridPrune(4, 3)}
    with torch.no_grad():
        outputs = [
            rs_compile.optimize(pooled(), Schedule(grid=grid, score=score), backend="eager")(images())
            for score in (Shift(), Lowest(), Shift(metric="l1"), Random())
        ]
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[3])
    assert all(out.shape == (2, 8) for out in outputs)


def test_report() -> None:
    model = rs_compile.optimize(pooled(), Schedule(grid={0: GridPrune(4, 3)}), backend="eager")
    model(images())
    report = model.report()
    assert [(r.stage, r.where, r.grid_in, r.grid_out) for r in report.stages] == [
        (0, "one", (12, 9), (8, 6)),
        (1, "two", (4, 3), (4, 3)),
    ]
    assert report.stages[1].macs < report.stages[1].macs_dense and report.stages[0].macs == report.stages[0].macs_dense
    assert "12 x 9" in str(report) and '"grid_out": [' in report.to_json()
