"""Encoders whose blocks hold their map flattened or with channels last: rows, columns and cells leave their stages.

By hand: the model's own forward, in which hooks keep what went into a stage's first block and came out of its last,
and cut the map that the next stage reads. Shapes: B samples, C channels, H rows, W columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
import transformers
from oracle_cnn import Cut, cells, cut_map
from timm.models.mambaout import MambaOut
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import Tensor, nn

import rs_compile
from passes.sites.grid_prune import GridPrune
from rs_compile import Schedule

ROWS, COLUMNS = 16, 12  # of the first stage: images of 64 x 48, in patches of 4
COMMON = {"depths": [2, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
COMMON |= {"sr_ratios": [4, 2], "patch_sizes": [7, 3], "strides": [4, 2], "num_encoder_blocks": 2}


@dataclass(frozen=True)
class Case:
    """A model.

    Args:
        build: makes it, two stages or three.
        blocks: the blocks of a stage.
        door: the module that reads the map of the stage before.
        last: channels are the last dimension of that map.
    """

    build: Callable[[], nn.Module]
    blocks: Callable[[Any, int], Sequence[nn.Module]] = lambda m, i: m.stages[i].blocks
    door: Callable[[Any, int], nn.Module] = lambda m, i: m.stages[i]
    last: bool = False


def caformer() -> nn.Module:
    """A stage of convolutions, then one of attention."""
    norms = [LayerNorm2dNoBias, LayerNormNoBias]
    return MetaFormer(
        num_classes=5, depths=(2, 1), dims=(8, 16), token_mixers=[SepConv, Attention], norm_layers=norms, head_dim=8
    )


def pvt(stages: int, **options: Any) -> nn.Module:
    """Two blocks in the first stage, one in each other."""
    depths, heads, ratios = (2, 1, 1)[:stages], (1, 2, 4)[:stages], (4, 2, 1)[:stages]
    dims, wider = (8, 16, 32)[:stages], (2, 2, 2)[:stages]
    return PyramidVisionTransformerV2(
        num_classes=5, depths=depths, embed_dims=dims, num_heads=heads, sr_ratios=ratios, mlp_ratios=wider, **options
    )


CASES = {
    "segformer": Case(lambda: transformers.SegformerModel(transformers.SegformerConfig(**COMMON))),
    "pvt v2 of transformers": Case(
        lambda: transformers.PvtV2Model(transformers.PvtV2Config(**COMMON)),
        lambda m, i: m.encoder.layers[i].blocks,
        lambda m, i: m.encoder.layers[i].patch_embedding,
    ),
    "glpn": Case(
        lambda: transformers.GLPNModel(transformers.GLPNConfig(**COMMON)),
        lambda m, i: m.encoder.block[i],
        lambda m, i: m.encoder.patch_embeddings[i],
    ),
    "pvt v2 of timm": Case(lambda: pvt(2)),
    "linear pvt v2": Case(lambda: pvt(2, linear=True)),
    "mambaout": Case(lambda: MambaOut(num_classes=5, depths=(2, 1), dims=(8, 16)), last=True),
    "caformer": Case(caformer),
}
LINES, CELLS = Cut(4, 2), Cut(4, 2, "token")


def made(case: Case) -> nn.Module:
    """With weights drawn so that no branch is small."""
    torch.manual_seed(0)
    model = case.build().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.dim() < 2 else 0.5 * p[0].numel() ** -0.5))
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 4 * ROWS, 4 * COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def result(out: Any) -> Tensor:
    value: Tensor = out if isinstance(out, Tensor) else out[0]
    return value


@torch.no_grad()
def by_hand(model: nn.Module, case: Case, cuts: dict[int, Cut]) -> tuple[Tensor, Tensor]:
    """What the model gives on its own maps made smaller; the score map [B, H, W] of the last one.

    Where not the shortcut alone is compared, blocks are timm's, with a sum in the middle that `norm2` reads.
    """
    seen: dict[int, list[Tensor]] = {i: [] for i in cuts}
    hooks, scores = [], []

    def shorter(i: int, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        whole = args[0].permute(0, 3, 1, 2) if case.last else args[0]
        x = seen[i]
        pairs = {"shortcut": [(x[0], x[-1])], "first-block": [(x[1], x[-1])], "sum": list(itertools.pairwise(x))}
        moved = [(after - before).square() for before, after in pairs[cuts[i].against]]  # cells x channels, or a map
        over = 1 if moved[0].shape[2:] == whole.shape[2:] else -1
        apart = sum(m.sum(over).sqrt() for m in moved).reshape(-1, *whole.shape[2:])
        short, margin = cut_map(whole, apart, cuts[i])
        assert margin > 1e-6  # rounding decides nothing
        scores.append(apart)
        return (short.permute(0, 2, 3, 1) if case.last else short), *args[1:]

    for i in cuts:
        blocks = case.blocks(model, i)
        middles = [b.norm2 for b in blocks] if cuts[i].against != "shortcut" else []
        hooks += [
            m.register_forward_pre_hook(lambda _, args, i=i: seen[i].append(args[0]))
            for m in [blocks[0], *middles, *blocks[1 : len(middles)]]
        ]
        hooks += [
            blocks[-1].register_forward_hook(lambda _, args, out, i=i: seen[i].append(result(out))),
            case.door(model, i + 1).register_forward_pre_hook(lambda _, args, i=i: shorter(i, args)),
        ]
    out = result(model(images()))
    for hook in hooks:
        hook.remove()
    return out, scores[-1]


def nearest(small: Tensor, score: Tensor, cut: Cut) -> Tensor:
    """A map of half the resolution, cells centred on every other one, at full size: each cell is the nearest left."""
    table, _ = cells(score, cut)
    full = small.new_empty(len(small), ROWS // 2, COLUMNS // 2)
    places = [(2 * i, 2 * j) for i in range(small.shape[1]) for j in range(small.shape[2])]
    for r in range(ROWS // 2):
        for c in range(COLUMNS // 2):
            away = [(table[i][j][0] - 2 * r) ** 2 + (table[i][j][1] - 2 * c) ** 2 for i, j in places]
            i, j = places[away.index(min(away))]
            full[:, r, c] = small[:, i // 2, j // 2]
    return full


@pytest.mark.parametrize(
    ("name", "cut"), [*((name, LINES) for name in CASES), ("segformer", CELLS), ("mambaout", CELLS)]
)
@torch.no_grad()
def test_what_the_model_itself_gives_on_the_smaller_map(name: str, cut: Cut) -> None:
    case = CASES[name]
    model = made(case)
    schedule = Schedule(grid={0: GridPrune(cut.rows, cut.columns, cut.mode)})
    got, dense = (result(m(images())) for m in (rs_compile.optimize(model, schedule, backend="eager"), model))
    wanted, scores = by_hand(model, case, {0: cut})
    if wanted.dim() == 4:
        assert wanted.shape[2:] == (6, 5)
        wanted = torch.stack([nearest(w, s, cut) for w, s in zip(wanted, scores, strict=True)])
    oracle.assert_close(got, wanted, 1e-9)
    assert got.shape == dense.shape and not torch.allclose(got, dense)


@torch.no_grad()
def test_two_cuts() -> None:
    case = Case(lambda: pvt(3))
    model = made(case)
    cuts = {0: Cut(4, 2), 1: Cut(2, 1, "token")}
    schedule = Schedule(grid={i: GridPrune(c.rows, c.columns, c.mode) for i, c in cuts.items()})
    oracle.assert_close(
        rs_compile.optimize(model, schedule, backend="eager")(images()), by_hand(model, case, cuts)[0], 1e-9
    )


@pytest.mark.parametrize("against", ["first-block", "sum"])
@torch.no_grad()
def test_compared_with_other_sums(against: Any) -> None:
    """A block of [B, H * W, C] is two sums, of attention and of the MLP."""
    case = CASES["pvt v2 of timm"]
    model = made(case)
    schedule = Schedule(grid={0: GridPrune(4, 2, against=against)})
    wanted, _ = by_hand(model, case, {0: Cut(4, 2, against=against)})
    oracle.assert_close(rs_compile.optimize(model, schedule, backend="eager")(images()), wanted, 1e-9)


@pytest.mark.parametrize("name", ["segformer", "mambaout"])
@torch.no_grad()
def test_nothing_leaves(name: str) -> None:
    model = made(CASES[name])
    same = rs_compile.optimize(model, Schedule(grid={0: GridPrune(0, 0)}), backend="eager")(images())
    assert torch.equal(result(same), result(model(images())))


def test_report() -> None:
    """The last map that mambaout's blocks make is pooled with its channels last, so no stage ends there."""
    stages = rs_compile.explain(made(CASES["segformer"]), images()).stages
    assert [(s.where, s.blocks, s.grid) for s in stages] == [
        ("stages.0.blocks", 4, (16, 12)),
        ("stages.1.blocks.0", 2, (8, 6)),
    ]
    assert [s.where for s in rs_compile.explain(made(CASES["mambaout"]), images()).stages] == ["stages.0.blocks"]
