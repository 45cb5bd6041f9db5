"""Zero-TPrune, PiToMe and DiffRate against the hand-written oracle, which shares no code with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import peers_oracle as by_hand
import pytest
import timm
import torch
from schedules import handle_of
from torch import Tensor, nn

from rs_compile import (
    CompileError,
    DiffRate,
    Lowest,
    MeanAttention,
    PiToMe,
    Refusal,
    Schedule,
    ScheduleError,
    ZeroTPrune,
    optimize,
)

PITOME = {
    "paper": (PiToMe(), 0.9, "paper", lambda i, n: True),
    "code, DeiT": (
        PiToMe(energy="code", margin=0.75, spare_in="second half", size_bias=False),
        0.75,
        "code",
        lambda i, n: i >= (n + 1) // 2,
    ),
    "code, MAE": (
        PiToMe(energy="code", margin=0.75, spare_in="first half"),
        0.75,
        "code",
        lambda i, n: i < (n + 1) // 2,
    ),
    "never spared": (PiToMe(spare_in="no block"), 0.9, "paper", lambda i, n: False),
}


def vit(seed: int = 0, depth: int = 3, **options: Any) -> Any:
    torch.manual_seed(seed)
    given: dict[str, Any] = {"img_size": 20, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    model = timm.models.VisionTransformer(**given | {"depth": depth, "init_values": 0.7} | options)
    for p in model.parameters():  # so that attention is no mean
        nn.init.normal_(p, std=0.25)
    return model.double().eval()


def images(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 20, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@torch.no_grad()
def check(
    schedule: Schedule,
    between: Mapping[int, by_hand.Rule] | None = None,
    behind: Mapping[int, by_hand.Rule] | None = None,
    size_bias: bool = True,
    tokens: bool = False,
    copy: bool = False,
    **options: Any,
) -> None:
    """The compiler's outputs equal the oracle's, and differ from the dense model's."""
    if tokens:
        options |= {"global_pool": "", "num_classes": 0}
    for seed in itertools.count():
        model, x = vit(seed, **options), images()
        logits, all_tokens, margin = by_hand.run(model, x, between or {}, behind or {}, size_bias, copy)
        if margin > 3e-6:  # float32 decides as the oracle does
            break
        assert seed < 20, "no seed whose choice is clear"
    wanted = all_tokens if tokens else logits
    got = handle_of(model, schedule)(x)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (got - model(x)).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "tokens"), [*((name, False) for name in PITOME), ("code, DeiT", True)])
def test_pitome(name: str, tokens: bool) -> None:
    by, margin, form, spare = PITOME[name]
    counts = {0: 4, 1: 5, 2: 3}
    rules = {i: by_hand.pitome(r, margin, form, spare) for i, r in counts.items()}
    check(Schedule(merge=counts, by=by), rules, size_bias=by.size_bias, tokens=tokens)


@pytest.mark.parametrize(
    ("pruned", "tokens"),
    [({}, False), ({0: 2, 1: 7, 2: 1}, False), ({0: 5, 2: 2}, True)],
    ids=["merges", "both", "drops first, all tokens"],
)
def test_diffrate(pruned: dict[int, int], tokens: bool) -> None:
    counts = {0: 5, 1: 9, 2: 4}
    rules = {i: by_hand.diffrate(r - pruned.get(i, 0), pruned.get(i, 0)) for i, r in counts.items()}
    check(Schedule(merge=counts, by=DiffRate(pruned=pruned)), rules, tokens=tokens)


def test_dropped_tokens_come_back_as_they_left_where_merged_ones_are_copies() -> None:
    counts, pruned = {0: 6, 2: 7}, {0: 2, 2: 4}
    rules = {i: by_hand.diffrate(r - pruned[i], pruned[i]) for i, r in counts.items()}
    check(Schedule(merge=counts, by=DiffRate(pruned=pruned, restore="copy")), rules, tokens=True, copy=True)


def test_diffrate_by_another_score_without_class_token() -> None:
    options = {"class_token": False, "global_pool": "avg"}
    rule = by_hand.diffrate(4, 2, lambda seen: seen.plain.mean((0, 1)).tolist())
    schedule = Schedule(merge={0: 6, 1: 6}, by=DiffRate(MeanAttention(), pruned={0: 2, 1: 2}))
    check(schedule, {0: rule, 1: rule}, **options)
    with pytest.raises(Refusal, match="class attention needs a class token in front"):
        optimize(vit(**options), Schedule(merge={0: 6}, by=DiffRate()), backend="eager")(images())


def test_what_merged_before_counts_in_diffrates_class_attention() -> None:
    """The importance is read with the size bias: without it other tokens would leave."""
    rules = {0: by_hand.diffrate(14, 0), 1: by_hand.diffrate(0, 8)}
    schedule = Schedule(merge={0: 14, 1: 8}, by=DiffRate(pruned={1: 8}))
    check(schedule, rules)
    plain = {**rules, 1: by_hand.diffrate(0, 8, lambda seen: seen.plain[:, 0].mean(0).tolist())}
    model, x = vit(), images()
    with_bias, without = (by_hand.run(model, x, r, {})[0] for r in (rules, plain))
    assert (with_bias - without).abs().max() > 1e-3


ZERO: dict[str, tuple[ZeroTPrune, Callable[[int, int], by_hand.Rule]]] = {
    "published": (ZeroTPrune(), lambda i, leave: by_hand.zero_tprune(leave, leave // 2, (30, 30, 30, 1, 1, 1)[i])),
    "I stage alone": (ZeroTPrune(similar=0, rounds=2), lambda i, leave: by_hand.zero_tprune(leave, 0, 2)),
    "S stage alone": (ZeroTPrune(similar=1, rounds=2), lambda i, leave: by_hand.zero_tprune(leave, leave, 2)),
    "uniform": (
        ZeroTPrune(start="uniform", rounds=1),
        lambda i, leave: by_hand.zero_tprune(leave, leave // 2, 1, False),
    ),
    "heads filtered": (
        ZeroTPrune(head_filter=True, rounds=3),
        lambda i, leave: by_hand.zero_tprune(leave, leave // 2, 3, True, True),
    ),
}


@pytest.mark.parametrize("name", ZERO)
def test_zero_tprune(name: str) -> None:
    score, rule = ZERO[name]
    keep, leave = {0: 18 / 26, 3: 13 / 18}, {0: 8, 3: 5}
    check(Schedule(keep, score=score), behind={i: rule(i, n) for i, n in leave.items()}, depth=6, embed_dim=16)


@pytest.mark.parametrize("reg", [{"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_zero_tprune_with_other_prefixes(reg: dict[str, Any]) -> None:
    count = 25 + (3 if "reg_tokens" in reg else 0)
    rule = by_hand.zero_tprune(11, 5, 30)
    check(Schedule({0: (count - 11) / count}, score=ZeroTPrune()), behind={0: rule}, **reg)


def test_the_published_filter_lets_no_head_pass_where_scores_sum_to_1() -> None:
    """As the class says: of 197 scores that sum to 1 the variance is below the lower bound, whatever they are."""
    for scores in (torch.rand(50, 197), torch.eye(197)):
        assert (scores / scores.sum(1, keepdim=True)).var(1, correction=0).max() <= 0.0051 < 0.01


@pytest.mark.inductor
@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(Schedule({0: 0.7}, score=ZeroTPrune(rounds=2)), marks=pytest.mark.slow),
        pytest.param(Schedule(merge={0: 5}, by=PiToMe()), marks=pytest.mark.slow),
        Schedule(merge={0: 6}, by=DiffRate(pruned={0: 2})),
    ],
    ids=["Zero-TPrune", "PiToMe", "DiffRate"],
)
def test_compiled(schedule: Schedule) -> None:
    model, x = vit(depth=1).float(), images().float()
    torch.testing.assert_close(
        optimize(model, schedule)(x), optimize(model, schedule, backend="eager")(x), rtol=1e-4, atol=1e-4
    )


def test_words() -> None:
    model, x = vit(), images()
    with pytest.raises(CompileError, match="block 0 is to merge 25 of 26 tokens away, and at most 24 can: all but one"):
        optimize(model, Schedule(merge={0: 25}, by=DiffRate()), backend="eager")(x)
    with pytest.raises(CompileError, match="to drop 7 tokens in block 1, of 6 that leave there"):
        optimize(model, Schedule(merge={1: 6}, by=DiffRate(pruned={1: 7})), backend="eager")(x)
    for make, said in (
        (lambda: PiToMe(margin=2), "margin is 2; write a cosine"),
        (lambda: PiToMe(energy="elu"), "unknown energy 'elu'; write one of 'paper', 'code'"),
        (lambda: PiToMe(spare_in="all"), "unknown spare_in 'all'"),
        (lambda: DiffRate(pruned=3), "pruned is 3; write how many"),
        (lambda: DiffRate(pruned={1: 0.5}), r"pruned is \{1: 0.5\}"),
        (lambda: DiffRate(Lowest()), "importance is Lowest"),
        (lambda: ZeroTPrune(similar=2), "similar is 2; write a share"),
        (lambda: ZeroTPrune(rounds=0), "rounds is 0; write an integer"),
        (lambda: ZeroTPrune(start="first"), "unknown start 'first'"),
    ):
        with pytest.raises(ScheduleError, match=said):
            make()
