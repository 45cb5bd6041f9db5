from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import graph_of, prepared
from torch import Tensor, nn

from passes.network.stages import find_stages


def conv(channels: int, out: int = 0, stride: int = 1, kernel: int = 3) -> nn.Module:
    return nn.Conv2d(channels, out or channels, kernel, stride, kernel // 2)


class Block(nn.Module):
    """A residual block; without `project` its shortcut is its input."""

    def __init__(self, channels: int, out: int = 0, stride: int = 1, project: bool = False, relu: bool = True) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv(channels, out, stride), nn.ReLU(), conv(out or channels))
        self.project = conv(channels, out, stride, 1) if project else nn.Identity()
        self.last = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.branch(x) + self.project(x))


def image(channels: int = 4, rows: int = 16, columns: int = 12) -> Tensor:
    return torch.randn(2, channels, rows, columns)


def shapes(model: nn.Module, x: Tensor | None = None) -> list[tuple[int, tuple[int, ...]]]:
    """Of each stage the number of blocks and the shape of its output without the batch."""
    stages = find_stages(prepared(model, image() if x is None else x))
    return [(len(s.blocks), tuple(s.output.meta["val"].shape[1:])) for s in stages]


def test_a_strided_block_opens_the_next_stage() -> None:
    model = nn.Sequential(conv(4), Block(4), Block(4), Block(4, 8, 2, project=True), Block(8), nn.Flatten())
    assert shapes(model) == [(2, (4, 16, 12)), (2, (8, 8, 6))]


def test_a_downsampling_layer_that_is_no_block_opens_the_next_stage() -> None:
    model = nn.Sequential(conv(4), Block(4, relu=False), conv(4, 8, 2, 2), Block(8, relu=False), Block(8, relu=False))
    assert shapes(model) == [(1, (4, 16, 12)), (2, (8, 9, 7))]


def test_the_output_is_the_sum_after_its_activation_and_the_shortcut_the_projection() -> None:
    gm = prepared(nn.Sequential(conv(4), Block(4, 8, project=True), Block(8)), image())
    (stage,) = find_stages(gm)
    assert stage.output.target is torch.ops.aten.relu.default
    assert stage.shortcut.target is torch.ops.aten.conv2d.default
    assert stage.shortcut is stage.blocks[0].shortcut and stage.shortcut is not stage.blocks[0].entry
    assert stage.blocks[1].shortcut is stage.blocks[1].entry is stage.blocks[0].output
    assert stage.output in stage.nodes and stage.blocks[0].entry not in stage.nodes


def test_an_activation_that_only_one_reader_sees_is_not_the_output() -> None:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = conv(4), conv(4), conv(4), conv(4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.b(self.a(x.relu()).relu())
            return x + self.d(self.c(x.relu()).relu())

    (stage,) = find_stages(prepared(PreActivation(), image()))
    assert [b.output.target for b in stage.blocks] == [torch.ops.aten.add.Tensor] * 2


def test_names_of_modules_are_in_the_report_only() -> None:
    model = nn.Sequential(conv(4), nn.Sequential(Block(4), Block(4)), Block(4, 8, 2, project=True))
    assert [s.where for s in find_stages(prepared(model, image()))] == ["1", "2"]


def test_a_long_skip_around_blocks_is_no_block() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(Block(4), Block(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    assert shapes(nn.Sequential(conv(4), Skip())) == [(2, (4, 16, 12))]


def test_sums_inside_a_block_are_part_of_it() -> None:
    class Cascade(nn.Module):
        """Two halves of the channels, the second with the first's result added."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b, self.last = conv(4), conv(2), conv(2), conv(4, kernel=1)

        def forward(self, x: Tensor) -> Tensor:
            p, q = self.first(x).chunk(2, 1)
            p = self.a(p)
            return x + self.last(torch.cat([p, self.b(p + q)], 1))

    assert shapes(nn.Sequential(conv(4), Cascade())) == [(1, (4, 16, 12))]


def test_an_attention_gate_on_the_branch() -> None:
    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.gate = nn.Sequential(conv(4), nn.ReLU(), conv(4)), conv(4, kernel=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.branch(x)
            return x + y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()

    assert shapes(nn.Sequential(conv(4), Squeeze())) == [(1, (4, 16, 12))]


def two(f: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """f of x and of two convolutions of it."""
    first, second = torch.randn(4, 4, 3, 3), torch.randn(4, 4, 3, 3)

    def forward(x: Tensor) -> Tensor:
        return f(x, nn.functional.conv2d(x, first, padding=1), nn.functional.conv2d(x, second, padding=1))

    return forward


@pytest.mark.parametrize(
    "f",
    [
        two(lambda x, a, b: a + b),  # neither is the shortcut
        two(lambda x, a, b: a * b),
        two(lambda x, a, b: x + x.relu()),  # no convolution
        two(lambda x, a, b: torch.add(x, a, alpha=2)),
        lambda x: x + torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), torch.ones(12, 12, 1, 1)).permute(0, 2, 3, 1),
    ],
    ids=["two branches", "product", "no convolution", "scaled", "channels last"],
)
def test_no_block(f: Callable[[Tensor], Tensor]) -> None:
    assert find_stages(graph_of(f, image())) == []


def test_one_convolution_is_a_branch() -> None:
    assert len(find_stages(graph_of(two(lambda x, a, b: x + a), image()))) == 1


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_convolutions_that_name_their_padding_are_convolutions(padding: str) -> None:
    """torch has an op of its own for them."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Conv2d(4, 4, 3 if padding == "same" else 1, padding=padding) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(self.a(x.sin()).relu())

    assert shapes(Named()) == [(1, (4, 16, 12))]


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sequence": (
        lambda x: x.flatten(2).transpose(1, 2),
        lambda x: x.transpose(1, 2).reshape(x.shape[0], 4, 16, 12),
    ),
    "cells last": (lambda x: x.flatten(2), lambda x: x.unflatten(2, (16, 12))),
    "channels last": (lambda x: x.permute(0, 2, 3, 1), lambda x: x.permute(0, 3, 1, 2)),
}


class Held(nn.Module):
    """Two residual blocks on a map in another form, the second without a convolution over cells; then the next map."""

    def __init__(self, form: str, middle: Callable[[Tensor], Tensor] = torch.relu, slides: bool = True) -> None:
        super().__init__()
        self.hold, self.view, self.middle, self.slides = *FORMS[form], middle, slides
        self.stem, self.a, self.b, self.next = conv(4), conv(4), nn.Linear(4, 4), conv(4, 8, 2)

    def each(self, x: Tensor) -> Tensor:
        """A linear layer over channels."""
        if x.shape[1] != 4:
            return self.b(x)
        return self.b(x.transpose(1, 2)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hold(self.stem(x))
        x = x + (self.hold(self.a(self.view(x))) if self.slides else self.each(x.sin()))
        x = x + self.each(x.cos())
        return self.next(self.view(self.middle(x)))


@pytest.mark.parametrize("form", FORMS)
def test_a_map_in_another_form(form: str) -> None:
    (stage,) = find_stages(prepared(Held(form), image()))
    assert len(stage.blocks) == 2 and stage.grid == (16, 12) and stage.blocks[0].map == (4, 16, 12)
    assert tuple(stage.output.meta["val"].shape[1:]) == (4, 16, 12)
    assert stage.output is not stage.sums and stage.sums.target is torch.ops.aten.relu.default
    x = image()
    assert torch.equal(stage.as_map(FORMS[form][0](x)), x)


def test_where_no_convolution_slides_there_is_no_stage() -> None:
    assert shapes(Held("sequence", slides=False)) == []


def test_what_reads_the_sum_beside_the_view_leaves_no_stage() -> None:
    assert shapes(Held("sequence", lambda x: x + x.mean(1, keepdim=True))) == []
    assert shapes(Held("sequence", lambda x: torch.nn.functional.layer_norm(x, [4]))) == [(2, (4, 16, 12))]


def test_a_token_beside_the_cells_leaves_no_stage() -> None:
    class Token(Held):
        def forward(self, x: Tensor) -> Tensor:
            x = self.hold(self.stem(x))
            x = torch.cat([x.mean(1, keepdim=True), x], 1)
            cells = self.hold(self.a(self.view(x[:, 1:])))
            x = x + torch.cat([x[:, :1], cells], 1)
            return self.next(self.view(x[:, 1:]))

    assert shapes(Token("sequence")) == []
