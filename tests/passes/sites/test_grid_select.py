from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from passes.sites.grid_select import kept_cells, kept_lines, score_map, spread, take


def scores(*rows: list[float]) -> Tensor:
    return torch.tensor([rows], dtype=torch.float32)


def test_the_score_is_the_distance_over_channels_summed_over_pairs() -> None:
    a, b, c = (torch.randn(2, 5, 3, 4) for _ in range(3))
    wanted = (a - b).pow(2).sum(1).sqrt() + (a - c).pow(2).sum(1).sqrt()
    torch.testing.assert_close(score_map([(a, b), (a, c)]), wanted)
    torch.testing.assert_close(score_map([(a, b)], "l1"), (a - b).abs().sum(1))
    assert score_map([(a.half(), b.half())]).dtype == torch.float32


def test_lines_go_by_their_mean_and_ties_to_the_earlier() -> None:
    rows, columns = kept_lines(scores([1, 2, 3], [0, 0, 0], [3, 2, 1], [2, 2, 2]), 2, 2)
    assert rows.tolist() == [[[0], [2]]]  # 0, 2 and 3 have one mean
    assert columns.tolist() == [[[0, 1]]]


@pytest.mark.parametrize("lowest", [False, True])
def test_a_square_goes_by_the_same_means(lowest: bool) -> None:
    """Where as many rows stay as columns they are chosen together."""
    s = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    rows, columns = kept_lines(s, 4, 4, lowest=lowest)
    assert (rows.shape, columns.shape) == ((3, 4, 1), (3, 1, 4))
    assert torch.equal(rows.flatten(1), s.mean(2).topk(4, largest=not lowest).indices.sort().values)
    assert torch.equal(columns.flatten(1), s.mean(1).topk(4, largest=not lowest).indices.sort().values)
    assert torch.equal(kept_lines(s, 4, 3, lowest=lowest)[0], rows)  # by itself


def test_rows_first_scores_columns_on_the_rows_left() -> None:
    s = scores([9, 0, 9], [0, 5, 0], [9, 1, 9])
    s[0, 1] = torch.tensor([0.0, 17.0, 0.0])  # row 1 leaves, with the reason that column 1 had to stay
    rows, columns = kept_lines(s, 2, 1)
    assert (rows.flatten().tolist(), columns.flatten().tolist()) == ([0, 2], [0])
    s[0, 1, 1] = 17.9
    s[0, 0] = torch.tensor([9.0, 0.2, 9.0])
    assert kept_lines(s, 2, 1)[1].flatten().tolist() == [1]
    assert kept_lines(s, 2, 1, rows_first=True)[1].flatten().tolist() == [0]


def test_cells_leave_each_row_then_each_column() -> None:
    rows, columns = kept_cells(scores([1, 2, 3], [6, 5, 4], [7, 0, 8]), 2, 2)
    # rows keep (1, 2), (0, 1), (0, 2): values 2 3 / 6 5 / 7 8; then columns keep rows (1, 2) and (1, 2)
    assert rows.tolist() == [[[1, 1], [2, 2]]]
    assert columns.tolist() == [[[0, 1], [0, 2]]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays(bad: float) -> None:
    s = torch.ones(1, 4, 5)
    s[0, 2, 3] = bad
    rows, columns = kept_lines(s, 1, 1)
    assert (rows.item(), columns.item()) == (2, 3)
    rows, columns = kept_cells(s, 1, 1)
    assert (rows.item(), columns.item()) == (2, 3)


def test_lowest_is_the_baseline() -> None:
    assert kept_lines(scores([1, 2], [3, 4]), 1, 1, lowest=True)[0].item() == 0
    assert [i.item() for i in kept_cells(scores([1, 2], [3, 4]), 1, 1, lowest=True)] == [0, 0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("whole", [True, False])
def test_take_keeps_the_memory_format_and_the_gradient(layout: torch.memory_format, whole: bool) -> None:
    x = torch.randn(2, 3, 5, 4).to(memory_format=layout).requires_grad_()
    r, c = torch.tensor([[0, 2, 4], [1, 2, 3]])[:, :, None], torch.tensor([[0, 3], [1, 2]])[:, None]
    if not whole:
        r, c = r.expand(2, 3, 2).contiguous(), c.expand(2, 3, 2).contiguous()
    out = take(x, r, c)
    assert out.is_contiguous(memory_format=layout)
    wanted = torch.stack([x[b][:, r[b].expand(3, 2), c[b].expand(3, 2)] for b in range(2)])
    assert torch.equal(out, wanted)
    weight = torch.randn(out.shape)
    (a,), (b,) = torch.autograd.grad((out * weight).sum(), x), torch.autograd.grad((wanted * weight).sum(), x)
    assert torch.equal(a, b)


def naive_spread(x: Tensor, rows: Tensor, columns: Tensor, cut: tuple[int, int], size: tuple[int, int],
                 step: int, start: float) -> Tensor:  # fmt: skip
    """Every cell from the nearest one, by search."""

    def at(i: int, length: int) -> float:
        return min(max(i * step + start, 0), length - 1)

    def between(values: list[float], place: float) -> float:
        low = math.floor(place)
        high = min(low + 1, len(values) - 1)
        return values[low] + (place - low) * (values[high] - values[low])

    out = torch.empty(*x.shape[:2], *size)
    for b in range(len(x)):
        height, width = rows.shape[1], columns.shape[2]
        r, c = rows[b].expand(height, width).float(), columns[b].expand(height, width).float()
        where = {}
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                p, q = at(i, height), at(j, width)
                where[i, j] = tuple(between([between(list(line), q) for line in table.tolist()], p) for table in (r, c))
        for y in range(size[0]):
            for z in range(size[1]):
                p, q = at(y, cut[0]), at(z, cut[1])
                i, j = min(where, key=lambda k: (where[k][0] - p) ** 2 + (where[k][1] - q) ** 2)
                out[b, :, y, z] = x[b, :, i, j]
    return out


@pytest.mark.parametrize(("step", "start"), [(1, 0.0), (2, 0.0), (2, 0.5), (4, 1.0)])
@pytest.mark.parametrize("whole", [True, False])
def test_spread_takes_the_nearest_cell(step: int, start: float, whole: bool) -> None:
    torch.manual_seed(step)
    s = torch.rand(2, 11, 9)
    rows, columns = (kept_lines if whole else kept_cells)(s, 8, 6)
    small, size = (math.ceil(8 / step), math.ceil(6 / step)), (math.ceil(11 / step), math.ceil(9 / step))
    x = torch.randn(2, 3, *small)
    got = spread(x, rows, columns, (11, 9), size, (step, step), (start, start))
    assert torch.equal(got, naive_spread(x, rows, columns, (11, 9), size, step, start))


def test_spread_puts_kept_lines_back_where_they_were() -> None:
    x = torch.randn(1, 2, 7, 8)
    rows, columns = kept_lines(torch.rand(1, 7, 8), 4, 5)
    back = spread(take(x, rows, columns), rows, columns, (7, 8), (7, 8), (1, 1), (0.0, 0.0))
    assert torch.equal(take(back, rows, columns), take(x, rows, columns))
