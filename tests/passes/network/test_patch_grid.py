"""Where each token lies in the image, against the gradient: the pixels that its embedding really depends on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graphs import graph_of, leaves, table
from torch import Tensor

from passes.graph.base import Refusal
from passes.network.patch_grid import Extent, PatchGrid, find_grid, map_grid

C = 5


def kernel(size: int, inputs: int = 1, outputs: int = C) -> Tensor:
    return table(outputs, inputs, size, size).abs() + 0.1  # no weight may cancel another


def flat(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def with_class(x: Tensor, c: Tensor) -> Tensor:
    return torch.cat([c.expand(x.shape[0], -1, -1), x], 1)


CLASS, MEAN = table(1, 1, C), table(1, 1, 1, seed=4)
Network = Callable[..., Tensor]

# of images [2, 1, 24, 40]: what cuts them, tables, rows x columns
CUT: dict[str, tuple[Network, tuple[Tensor, ...], tuple[int, int]]] = {
    "convolution": (lambda x, k: flat(F.conv2d(x, k, stride=8)), (kernel(8),), (3, 5)),
    "class token": (lambda x, k, c: with_class(flat(F.conv2d(x, k, stride=8)), c), (kernel(8), CLASS), (3, 5)),
    "token first": (lambda x, k: F.conv2d(x, k, stride=8).flatten(2).permute(2, 0, 1), (kernel(8),), (3, 5)),
    "normalised first": (lambda x, k, m: flat(F.conv2d((x - m) / 2, k, stride=8)), (kernel(8), MEAN), (3, 5)),
    "a remainder is left": (lambda x, k: flat(F.conv2d(x, k, stride=9)), (kernel(9),), (2, 4)),
    "padded to whole patches": (lambda x, k: flat(F.conv2d(F.pad(x, (2, 3, 1, 2)), k, stride=9)), (kernel(9),), (3, 5)),
    "cropped": (lambda x, k: flat(F.conv2d(x[:, :, 4:20, -32:], k, stride=8)), (kernel(8),), (2, 4)),
    "viewed": (lambda x, k: F.conv2d(x, k, stride=8).view(-1, C, 15).transpose(1, 2), (kernel(8),), (3, 5)),
    "channels last, normalised": (
        lambda x, k: F.layer_norm(F.conv2d(x, k, stride=8).permute(0, 2, 3, 1), [C]).reshape(-1, 15, C),
        (kernel(8),),
        (3, 5),
    ),
    "tokens on a grid": (
        lambda x, k: F.layer_norm(F.conv2d(x, k, stride=8).permute(0, 2, 3, 1), [C]),
        (kernel(8),),
        (3, 5),
    ),
    "reshaped to patches": (
        lambda x, w: F.linear(x.reshape(-1, 1, 3, 8, 5, 8).permute(0, 2, 4, 3, 5, 1).reshape(-1, 15, 64), w),
        (table(C, 64).abs() + 0.1,),
        (3, 5),
    ),
}


def grid_of(network: Network, tables: tuple[Tensor, ...], image: Tensor) -> PatchGrid:
    gm = graph_of(network, image, tables=tables)
    (stream,) = leaves(gm)
    shape = stream.meta["val"].shape
    return find_grid(gm, stream, next(d for d in range(2) if isinstance(shape[d], int)))


def seen(network: Network, tables: tuple[Tensor, ...], image: Tensor) -> list[tuple[int, int, int, int] | None]:
    """For each token top, bottom, left, right of the pixels it depends on (half-open), by autograd."""
    image = image.clone().requires_grad_()
    out = network(image, *tables)
    out = out.flatten(1, 2) if out.dim() == 4 else out
    tokens = out[0] if out.shape[0] == image.shape[0] else out[:, 0]
    boxes: list[tuple[int, int, int, int] | None] = []
    for token in tokens:
        touched = torch.zeros_like(image[0, 0], dtype=torch.bool)
        for channel in token:
            if channel.requires_grad:
                (gradient,) = torch.autograd.grad(channel, image, retain_graph=True)
                touched |= gradient[0, 0] != 0
        rows, columns = touched.any(1).nonzero(), touched.any(0).nonzero()
        box = (int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1) if len(rows) else None
        boxes.append(box)
    return boxes


@pytest.mark.parametrize(("network", "tables", "shape"), CUT.values(), ids=CUT)
def test_cells_are_the_pixels_that_a_token_sees(
    network: Network, tables: tuple[Tensor, ...], shape: tuple[int, int]
) -> None:
    image = torch.rand(2, 1, 24, 40, generator=torch.Generator().manual_seed(0))
    grid = grid_of(network, tables, image)
    assert grid.shape == shape
    boxes = seen(network, tables, image)
    assert len(boxes) == len(grid.cells)
    for cell, box in zip(grid.cells, boxes, strict=True):
        if cell is None:
            assert box is None
            continue
        r, c = divmod(cell, shape[1])
        found = (
            grid.rows.edge(r, 24),
            grid.rows.edge(r + 1, 24),
            grid.columns.edge(c, 40),
            grid.columns.edge(c + 1, 40),
        )
        assert found == box


OVERLAPPING: dict[str, tuple[Network, tuple[Tensor, ...]]] = {
    "wide convolution": (lambda x, k: flat(F.conv2d(x, k, stride=4, padding=3)), (kernel(7),)),
    "stem of two": (
        lambda x, a, b: flat(F.conv2d(F.conv2d(x, a, stride=2, padding=1), b, stride=2, padding=1)),
        (kernel(3), kernel(3, C)),
    ),
    "dilated": (lambda x, k: flat(F.conv2d(x, k, stride=4, dilation=2, padding=1)), (kernel(3),)),
    "pooled": (lambda x, k: flat(F.avg_pool2d(F.conv2d(x, k, stride=2), 3, 2, 1)), (kernel(2),)),
    "every other": (lambda x, k: flat(F.conv2d(x, k, stride=2, padding=1)[:, :, 1::2, 1::2]), (kernel(3),)),
    "residual stem": (
        lambda x, a, b: flat(F.conv2d((y := F.conv2d(x, a, padding="same")) + F.conv2d(y, b, padding=1), b, stride=4)),
        (kernel(3), kernel(3, C)),
    ),
}


@pytest.mark.parametrize(("network", "tables"), OVERLAPPING.values(), ids=OVERLAPPING)
def test_cells_lie_around_the_middle_of_what_a_token_sees(network: Network, tables: tuple[Tensor, ...]) -> None:
    image = torch.rand(2, 1, 48, 64, generator=torch.Generator().manual_seed(0))
    grid = grid_of(network, tables, image)
    rows, columns = grid.shape
    boxes = seen(network, tables, image)
    inner = [r * columns + c for r in range(2, rows - 2) for c in range(2, columns - 2)]  # not cut at the border
    assert len(inner) > 8
    for token in inner:
        r, c = divmod(token, columns)
        top, bottom, left, right = boxes[token] or (0, 0, 0, 0)
        assert grid.rows.start + (r + 0.5) * grid.rows.step == (top + bottom) / 2
        assert grid.columns.start + (c + 0.5) * grid.columns.step == (left + right) / 2


def test_outer_cells_reach_to_the_border() -> None:
    grid = grid_of(*OVERLAPPING["wide convolution"], torch.rand(2, 1, 48, 64))
    assert (grid.columns.start, grid.columns.cells) == (-1.5, 16)
    edges = [grid.columns.edge(i, 64) for i in range(17)]
    assert edges[0] == 0 and edges[-1] == 64 and edges == sorted(set(edges))


def test_fields_are_what_a_cell_depends_on() -> None:
    for name, (network, tables) in OVERLAPPING.items():
        image = torch.rand(2, 1, 48, 64)
        grid = grid_of(network, tables, image)
        top, bottom, left, right = seen(network, tables, image)[5 * grid.shape[1] + 5] or (0, 0, 0, 0)
        assert grid.rows.field == grid.columns.field
        beside = 2 if name == "residual stem" else 0  # by its branch, where the way back went by the skip
        assert grid.rows.field + beside == bottom - top == right - left


def test_the_map_of_a_network_of_convolutions() -> None:
    def network(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = F.max_pool2d(F.conv2d(x, a, stride=2, padding=3), 3, 2, 1)
        return (F.conv2d(y, b, padding=1) + y).relu()

    gm = graph_of(network, torch.rand(2, 1, 48, 64), tables=(kernel(7), kernel(3, C)))
    grid = map_grid(gm, leaves(gm)[0])
    assert grid.shape == (12, 16) and grid.cells == tuple(range(12 * 16))
    # as in every ResNet: centred on pixel 0, 4, 8, ...; 7 + 2 * 2 pixels of the stem, and 2 * 4 of the 3 x 3
    assert grid.rows == Extent(12, -1.5, 4, 19)


REFUSED: dict[str, tuple[Network, tuple[Tensor, ...], tuple[int, ...], str]] = {
    "video": (
        lambda x, k: F.conv3d(x, k, stride=(2, 8, 8)).flatten(2).transpose(1, 2),
        (table(C, 1, 2, 8, 8),),
        (2, 1, 4, 24, 40),
        r"the tokens run over 3 dimensions \(2 x 3 x 5\)",
    ),
    "tokens given": (lambda x: x * 2, (), (2, 15, C), "cannot be followed back to the image through placeholder"),
    "two images": (
        lambda x, k: torch.cat([flat(F.conv2d(x, k, stride=8)), flat(F.conv2d(x * 2, k, stride=8))], 1),
        (kernel(8),),
        (2, 1, 24, 40),
        "the tokens come from 2 places",
    ),
    "rows turned over": (
        lambda x, k: flat(F.conv2d(x.flip(2), k, stride=8)),
        (kernel(8),),
        (2, 1, 24, 40),
        "cannot be followed back to the image through aten.flip",
    ),
    "tokens and channels joined": (
        lambda x, k: flat(F.conv2d(x, k, stride=8)).reshape(-1, 5, 3 * C),
        (kernel(8),),
        (2, 1, 24, 40),
        "the tokens are cut in a way that is no grid of patches",
    ),
    "columns first": (
        lambda x, k: F.conv2d(x, k, stride=8).transpose(2, 3).flatten(2).transpose(1, 2),
        (kernel(8),),
        (2, 1, 24, 40),
        "do not come from rows and columns of one image",
    ),
}


@pytest.mark.parametrize(("network", "tables", "shape", "words"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_is_no_grid(
    network: Network, tables: tuple[Tensor, ...], shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(Refusal, match=words):
        grid_of(network, tables, torch.rand(*shape))
