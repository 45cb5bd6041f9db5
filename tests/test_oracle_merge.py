"""Merging, compiled, against the same merging done by hand (see `merge_oracle`)."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, get_args

import hypothesis
import merge_models
import merge_oracle
import oracle
import pytest
import torch
from generated import Config, GeneratedViT
from hypothesis import strategies as st
from merge_oracle import Merging, Result
from schedules import handle_of, merger_of, merging_of
from strategies import configs
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from zoo import ZOO

from passes.network.branches import find_blocks
from passes.network.prunable import protected_tokens
from passes.pipeline import prepare
from passes.sites.insert_merge import InsertMerge
from passes.sites.insert_ward import InsertWard
from passes.sites.matching import most
from passes.sites.site import SITE

pytestmark = pytest.mark.usefixtures("captured_once")

TOLERANCE = 2e-4  # outputs are of order 1 to 10 and every block multiplies rounding errors
APART = 0.02  # what merging must change at least: 100 times the tolerance
CLEAR = 1e-5  # of cosines in float32: nearer decisions are left to rounding
SINGLE = [  # (merger, importance, operation)
    ("stream", "shift", "mlp"),
    ("tome", "shift", "mlp"),
    ("vid-tldr", "attention-entropy", "mlp"),
    ("vid-tldr", "shift", "mlp"),
    ("vid-tldr", "shift", "attention"),
    ("vid-tldr", "shift", "block"),
    ("vid-tldr", "mean-attention", "mlp"),
    ("ward", "shift", "mlp"),
]


@functools.cache
def model_of(name: str) -> nn.Module:
    return ZOO[name].model()


def optimized(model: nn.Module, how: Merging, **options: Any) -> nn.Module:
    return handle_of(model, merging_of(how), **options)


def check(name: str, how: Merging, batch: int = 2, seed: int = 0, tolerance: float = TOLERANCE, **options: Any) -> None:
    model, images = model_of(name), ZOO[name].images(batch, seed)
    wanted = merge_oracle.run(merge_models.ZOO[name](model), images, how)
    assert wanted.margin > CLEAR, f"{name}: near tie {wanted.margin:.1e}, choose another seed"
    dense = model(images)
    for field, tensor in wanted.outputs.items():
        apart = oracle.max_difference(tensor, oracle.named_outputs(dense)[field])
        assert apart > APART, f"{name} {field}: merging changes only {apart:.1e}, the test could not fail"
    compiled = optimized(model, how, **options)
    got = compiled(images)
    assert type(got) is type(dense), f"{name}: returned {type(got).__name__}"
    oracle.assert_close(got, wanted.outputs, tolerance, f"{name} {how}")


CASES: list[tuple[str, Merging]] = [
    ("deit_tiny_distilled", Merging({0: 6, 1: 5}, "vid-tldr", importance="attention-entropy", prefix=2)),
    ("dinov2_reg4", Merging({0: 13}, "stream", prefix=5)),
    ("siglip", Merging({0: 18}, "tome")),
    ("vit_all_tokens", Merging({1: 5, 2: 5}, "stream", keep={0: 0.8}, prefix=1)),
    ("hf_vit", Merging({0: 9, 2: 5}, "tome", keep={1: 0.7}, prefix=1)),
    ("hf_videomae_classifier", Merging({0: 16, 1: 8}, "vid-tldr", importance="attention-entropy", weighted_mean=True)),
    ("hf_vit", Merging({1: 9, 2: 5}, "ward", keep={0: 0.7}, prefix=1)),
    ("deit_tiny", Merging({0: 6, 1: 5, 2: 4}, "tome", prefix=1)),
    ("deit_tiny", Merging({0: 6, 1: 5, 2: 4}, "ward", prefix=1)),
    ("dinov2_reg4", Merging({1: 13}, "ward", prefix=5, extra=(20, 31))),
    ("siglip", Merging({0: 9, 1: 9}, "ward", size_bias=False)),
    ("vit_average", Merging({0: 9, 2: 5}, "ward", prefix=1, weighted_mean=True)),
    ("vit_all_tokens", Merging({1: 9, 2: 5}, "ward", keep={0: 0.8}, prefix=1, restore="copy")),
    ("hf_videomae_classifier", Merging({0: 25, 1: 12}, "ward")),
    ("deit_tiny", Merging({0: 9, 1: 5}, "stream", prefix=1, size_bias=False)),
    ("deit_tiny_distilled", Merging({0: 6, 1: 5}, "tome", prefix=2)),
    ("dinov2_reg4", Merging({0: 13}, "tome", prefix=5, extra=(20, 31))),
    ("siglip", Merging({0: 9, 1: 9}, "stream")),
    ("siglip", Merging({0: 9, 1: 9}, "vid-tldr", importance="attention-entropy", size_bias=False)),
    ("vit_average", Merging({0: 9}, "stream", prefix=1, weighted_mean=True)),
    ("vit_average", Merging({0: 9, 2: 5}, "tome", prefix=1)),
    ("vit_all_tokens", Merging({0: 9, 1: 5}, "vid-tldr", prefix=1)),
    ("hf_vit_eager", Merging({0: 9}, "stream", keep={1: 0.8, 2: 0.8}, prefix=1, operation="attention")),
    ("hf_vit_eager", Merging({0: 9, 1: 5}, "vid-tldr", operation="attention", prefix=1)),
    ("hf_videomae_classifier", Merging({0: 25, 1: 12}, "tome")),
]


def slow_but(first: int) -> list[Any]:
    """The cases; all but the first few are slow, by the seconds that each capture takes."""
    marks = [()] * first + [pytest.mark.slow] * (len(CASES) - first)
    pairs = zip(CASES, marks, strict=True)
    return [pytest.param(name, how, marks=mark, id=f"{name}-{how.merger}") for (name, how), mark in pairs]


@pytest.mark.parametrize(("name", "how"), slow_but(7))
@torch.no_grad()
def test_real_models_equal_the_oracle(name: str, how: Merging) -> None:
    check(name, how)


@torch.no_grad()
def test_attention_written_out_equals_the_oracle() -> None:
    """The published form: every attention as softmax(Q K^T + log n) V; the sizes are added once."""
    check(
        "deit_tiny",
        Merging({0: 9, 1: 5}, "vid-tldr", importance="attention-entropy", prefix=1),
        explicit_attention=True,
    )


@pytest.mark.inductor
@torch.no_grad()
def test_inductor_equals_the_oracle() -> None:
    how = Merging({0: 9}, "vid-tldr", importance="attention-entropy", keep={1: 0.8}, prefix=1)
    check("deit_tiny", how, backend="inductor", tolerance=1e-3)


@torch.no_grad()
def test_double_precision_leaves_no_room_for_small_errors() -> None:
    model, images = ZOO["siglip"].model().double(), ZOO["siglip"].images(2).double()
    how = Merging({0: 9, 1: 9}, "tome")
    got = optimized(model, how)(images)
    oracle.assert_close(
        got, merge_oracle.run(merge_models.timm_vit(model), images, how).outputs, 1e-6, "siglip, double"
    )


# generated models


def unfolded() -> st.SearchStrategy[Config]:
    """Configs whose attention runs over [batch, heads, tokens, channels]; folded ones take neither bias nor keys."""
    return configs().map(
        lambda c: replace(c, attention={"bmm": "sdpa", "baddbmm": "einsum"}.get(c.attention, c.attention))
    )


@st.composite
def mergings(draw: st.DrawFn, config: Config, prune: bool = True) -> Merging:
    """Schedules that merge something in `config`, and perhaps prune in other blocks."""
    singles = [s for s in SINGLE if config.parallel == "none" or s[0] == "stream" or s[1:] == ("shift", "mlp")]
    singles = [s for s in singles if config.parallel == "none" or s[0] not in ("tome", "ward")]
    merger, importance, operation = draw(st.sampled_from(singles))
    blind = config.output in ("class", "tokens") and config.depth > 1
    first = draw(st.integers(0, config.depth - 2 if blind else config.depth - 1))
    merge: dict[int, int] = {}
    keep: dict[int, float] = {}
    tokens = config.tokens
    for block in range(first, config.depth):
        what = "merge" if block == first else draw(st.sampled_from(("merge", "merge", "keep", "none")))
        free = tokens - config.prefix
        if what == "merge" and free >= 2:
            merge[block] = draw(st.integers(1, free // 2))
            tokens -= merge[block]
        elif what == "keep" and prune and oracle.keep_count(tokens, 0.75) > config.prefix:
            keep[block] = 0.75
            tokens = oracle.keep_count(tokens, 0.75)
    return Merging(
        merge,
        merger,
        keep,
        operation=operation,
        metric=draw(st.sampled_from(("l2", "l1"))),
        with_skip=operation != "block" and draw(st.booleans()),
        importance=importance,
        size_bias=draw(st.booleans()),
        weighted_mean=draw(st.booleans()),
        restore=draw(st.sampled_from(("change", "copy"))),
        prefix=config.prefix,
    )


def by_hand(model: GeneratedViT, images: Tensor, how: Merging) -> Result:
    return merge_oracle.run(merge_models.generated(model), images, how)


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs every output element differently, for every parameter that has one."""
    weight = torch.linspace(-1.0, 1.0, output.numel()).reshape(output.shape)
    names, parameters = zip(*model.named_parameters(), strict=True)
    values = torch.autograd.grad((output * weight).sum(), parameters, allow_unused=True)
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


@hypothesis.given(data=st.data(), config=unfolded(), batch=st.integers(1, 3))
@hypothesis.settings(max_examples=4)
def test_generated_models_equal_the_oracle_with_gradients(data: st.DataObject, config: Config, batch: int) -> None:
    model = GeneratedViT(config)
    how = data.draw(mergings(config))
    images = model.images(batch)
    wanted = by_hand(model, images, how)
    hypothesis.assume(wanted.margin > CLEAR)
    got = optimized(model, how)(images)
    oracle.assert_close(got, wanted.outputs, TOLERANCE, f"{config} {how}")
    expected, actual = gradients(model, wanted.outputs["output"]), gradients(model, got)
    for name in expected:
        scale = max(1.0, expected[name].abs().max().item())
        gap = oracle.max_difference(actual.get(name, torch.zeros_like(expected[name])), expected[name]) / scale
        assert gap <= 1e-3, f"gradient of {name}: max abs difference {gap:.3e} of {scale:.1e}; {config} {how}"


@hypothesis.given(config=unfolded(), merger=st.sampled_from(get_args(merge_oracle.Merger)))
@hypothesis.settings(max_examples=4)
@torch.no_grad()
def test_nothing_merged_is_bit_equal(config: Config, merger: merge_oracle.Merger) -> None:
    hypothesis.assume(config.parallel == "none" or merger == "stream")
    model = GeneratedViT(config)
    how = Merging(dict.fromkeys(range(config.depth), 0), merger)
    images = model.images(3)
    assert torch.equal(optimized(model, how)(images), model(images)), f"{config}"


@hypothesis.given(config=unfolded(), merger=st.sampled_from(get_args(merge_oracle.Merger)), data=st.data())
@hypothesis.settings(max_examples=8)
@torch.no_grad()
def test_a_merge_alone_is_bit_equal(config: Config, merger: merge_oracle.Merger, data: st.DataObject) -> None:
    """The graph with matching and merging in it, before the rest of the network runs on what is left."""
    hypothesis.assume(config.parallel == "none" or merger == "stream")
    model = GeneratedViT(config)
    images = model.images(2)
    gm = prepare(model, (images,), {}, lower=True).gm
    wanted = gm(images)[0]
    block = data.draw(st.sampled_from(find_blocks(gm)))
    guard = protected_tokens(gm, block, None)
    r = data.draw(st.integers(1, most(config.tokens, guard.prefix, guard.suffix, len(guard.extra))))
    put = InsertWard(block, r, guard) if merger == "ward" else InsertMerge(block, r, guard, merger_of(merger))
    gm = put.apply(gm).gm
    assert torch.equal(gm(images)[0], wanted), f"{config}"
    assert (SITE.of(gm).short.meta["val"].shape[1]) == config.tokens - r


@hypothesis.given(data=st.data(), config=unfolded())
@hypothesis.settings(max_examples=2)
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch_and_two_runs_are_bit_equal(data: st.DataObject, config: Config) -> None:
    model = GeneratedViT(config)
    how = data.draw(mergings(config))
    images = model.images(3)
    hypothesis.assume(by_hand(model, images, how).margin > CLEAR)
    compiled = optimized(model, how)
    together = compiled(images)
    assert torch.equal(together, compiled(images))
    oracle.assert_close(together, compiled(images.flip(0)).flip(0), TOLERANCE, f"reversed {config} {how}")
    for i in range(3):
        oracle.assert_close(together[i : i + 1], compiled(images[i : i + 1]), TOLERANCE, f"sample {i} {config} {how}")


@torch.no_grad()
@pytest.mark.parametrize("restore", ["change", "copy"])
def test_tokens_merged_in_the_last_block_come_back(restore: Any) -> None:
    """As they were, or with their destination's value."""
    model = GeneratedViT(PLAIN)
    images = model.images(2)
    for how in (Merging({2: 6}, prefix=1, restore=restore), Merging({1: 6, 2: 4}, prefix=1, restore=restore)):
        wanted = by_hand(model, images, how)
        oracle.assert_close(optimized(model, how)(images), wanted.outputs, TOLERANCE, f"{how}")


@torch.no_grad()
def test_sizes_pass_a_norm_between_blocks() -> None:
    """Post-norm: each block's sums start from a norm, yet the tokens and their sizes are the same."""
    model = GeneratedViT(replace(PLAIN, norm="post"))
    images = model.images(2)
    how = Merging({0: 6, 2: 4}, keep={1: 0.8}, prefix=1)
    wanted = by_hand(model, images, how)
    assert wanted.margin > CLEAR
    oracle.assert_close(optimized(model, how)(images), wanted.outputs, TOLERANCE, f"{how}")


PLAIN = Config(depth=3, width=16, grid=(4, 5), prefix=1, output="tokens")


def sizes_in(compiled: Any, images: Tensor) -> list[Tensor]:
    """The sizes [B, n] that the attentions of a rewritten graph read, in order."""
    found: list[Tensor] = []

    class Record(Interpreter):
        def run_node(self, n: Node) -> Any:
            if n.target is torch.ops.aten.log.default:
                found.append(self.fetch_args_kwargs_from_env(n)[0][0])
            return super().run_node(n)

    compiled(images)
    Record(compiled.graph_module()).run(images)
    return found


@pytest.mark.parametrize(("merger", "importance", "operation"), [*SINGLE[:4], SINGLE[-1]])
@torch.no_grad()
def test_sizes_carried_through_merges_and_prunes(merger: Any, importance: Any, operation: Any) -> None:
    """ToMe's and the stream's sum to the number of tokens merged so far; all equal the oracle's."""
    model = GeneratedViT(PLAIN)
    images = model.images(2)
    first = 1 if merger == "ward" else 0  # the first block whose attention reads what merged there
    merge = {first: 7, first + 1: 5}
    how = Merging(merge, merger, importance=importance, operation=operation, prefix=1)
    found = sizes_in(optimized(model, how), images)
    wanted = [by_hand(model, images, replace(how, merge=some)) for some in ({first: 7}, merge)]
    assert min(r.margin for r in wanted) > CLEAR
    assert [s.shape[1] for s in found] == [14, 9]
    for got, by in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, by.stream.sizes, atol=1e-5, rtol=0)
        if merger != "vid-tldr":
            assert got.sum(1).tolist() == [21.0, 21.0]
        else:
            assert (got.sum(1) < 21).all()  # its weights are at most 1 and some are less


@pytest.mark.parametrize(
    ("merger", "importance"),
    [("stream", "shift"), ("tome", "shift"), ("vid-tldr", "attention-entropy"), ("ward", "shift")],
)
@torch.no_grad()
def test_a_sample_of_nan_leaves_its_neighbours_alone(merger: Any, importance: Any) -> None:
    model = GeneratedViT(PLAIN)
    images = model.images(3)
    compiled = optimized(model, Merging({0: 7, 1: 4}, merger, importance=importance, keep={2: 0.8}))
    clean = compiled(images)
    images[1, :, :2, :2] = torch.nan
    spoilt = compiled(images)
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])
    assert spoilt[1].isnan().all()


@torch.no_grad()
def test_merging_equal_tokens_loses_nothing() -> None:
    """n equal tokens are one token of size n: with size bias and a weighted mean the model's own result."""
    model = GeneratedViT(Config(depth=3, width=16, grid=(4, 4), prefix=0, output="mean"))
    model.position.zero_()
    images = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 4, 4)
    images[:, :, 4:] *= 2.0  # two kinds of patches, eight of each
    wanted = model(images)
    how = Merging({0: 8, 1: 4}, "stream", weighted_mean=True)
    oracle.assert_close(optimized(model, how)(images), wanted, 1e-5, "equal tokens")
