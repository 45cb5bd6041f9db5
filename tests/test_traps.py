"""Models and circumstances made to mislead a compiler that guesses."""

from __future__ import annotations

import copy
import threading
from typing import Any, get_args

import oracle
import pytest
import timm
import torch
from generated import ATTENTIONS, Config, GeneratedViT
from oracle import Pruning
from schedules import pruning_of
from torch import Tensor, nn

import rs_compile

TOLERANCE = 2e-4
APART = 0.01


def check(config: Config, pruning: Pruning, batches: tuple[int, ...] = (3,)) -> None:
    """The compiled model equals the oracle, and differs from the dense model."""
    model = GeneratedViT(config)
    compiled = rs_compile.optimize(model, pruning_of(pruning), backend="eager")
    for batch in batches:
        images = model.images(batch)
        with torch.no_grad():
            wanted = model.forward_pruned(images, pruning)
            got, dense = compiled(images), model(images)
        assert wanted.margin > 1e-5, f"near tie {wanted.margin:.1e}, choose another seed"
        apart = oracle.max_difference(wanted.outputs["output"], dense)
        assert apart > APART, f"pruning changes only {apart:.1e}, the test could not fail"
        oracle.assert_close(got, wanted.outputs, TOLERANCE, str(config))


@pytest.mark.parametrize("attention", ["sdpa", "scale-after", "bmm"])
@pytest.mark.parametrize(
    ("what", "config"),
    [
        ("N = C", Config(width=16, grid=(3, 5), prefix=1)),
        ("N = 3C", Config(width=8, heads=1, grid=(4, 6), prefix=0, output="mean")),
        ("N = 3C with class token", Config(width=8, heads=1, grid=(1, 23), prefix=1)),
        ("N = C / H", Config(width=32, heads=2, grid=(3, 5), prefix=1)),
        ("N = H", Config(width=32, heads=8, grid=(1, 7), prefix=1)),
        ("patches = C", Config(width=16, grid=(4, 4), prefix=1, output="patch-mean")),
        ("20 tokens become 16 = C", Config(width=16, grid=(3, 5), prefix=5, output="tokens", rope=True)),
        ("C rows of C tokens", Config(width=16, grid=(4, 4), prefix=0, output="tokens", mask="buffer")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_token_count_collides(what: str, config: Config, attention: str) -> None:
    config = Config(**{**vars(config), "attention": attention})
    check(config, Pruning({0: 0.8, 1: 0.5}), batches=(config.tokens, 3))  # the batch collides as well


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("mask", ["buffer", "computed", "boolean"])
def test_constant_mask(mask: str, attention: str) -> None:
    config = Config(mask=mask, attention=attention, prefix=2, output="tokens")
    check(config, Pruning({0: 0.75, 1: 0.7}))


@pytest.mark.parametrize("attention", ["sdpa", "fp32-softmax", "einsum"])
@pytest.mark.parametrize("mask", ["none", "computed"])
def test_regions_with_autocast_off_and_without_gradients(attention: str, mask: str) -> None:
    """Export captures both as subgraphs (wrap_with_autocast, wrap_with_set_grad_enabled)."""
    config = Config(
        attention=attention,
        mask=mask,
        rope=True,
        autocast_off=True,
        tables_no_grad=True,
        prefix=2,
        output="patch-mean",
        depth=3,
    )
    check(config, Pruning({0: 0.75, 1: 0.7}))


@torch.no_grad()
def test_autocast_outside_is_a_signature_of_its_own() -> None:
    model = GeneratedViT(Config(autocast_off=False, attention="scale-query"))
    images = model.images(2)
    compiled = rs_compile.optimize(model, {0: 1.0}, backend="eager")
    full = compiled(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = compiled(images), model(images)
    assert got.dtype == wanted.dtype, f"{got.dtype} under autocast instead of {wanted.dtype}"
    gap = oracle.max_difference(got.float(), wanted.float())
    assert gap <= 0.02 * wanted.abs().max(), f"max abs difference {gap:.3e} under autocast"
    assert oracle.max_difference(full, got.float()) > 0, "the fp32 capture was used under autocast"
    assert torch.equal(compiled(images), model(images)), "the autocast capture was used without autocast"


@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("operation", get_args(oracle.Operation))
@pytest.mark.parametrize("parallel", ["left", "inner"])
def test_parallel_branches_are_told_apart(parallel: str, operation: oracle.Operation, with_skip: bool) -> None:
    """The sum of three terms is no branch's x + F(x)."""
    config = Config(parallel=parallel, output="patch-mean", grid=(4, 4))
    check(config, Pruning({0: 0.6}, operation, with_skip=with_skip))


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("output", ["patch-mean", "tokens"])
@torch.no_grad()
def test_ties_go_to_the_earlier_token(output: str, lowest: bool) -> None:
    """An MLP that adds nothing shifts every token by exactly 0."""
    model = GeneratedViT(Config(output=output, depth=3, grid=(4, 5)))
    for parameter in model.typed_blocks()[0].mlp.parameters():
        parameter.zero_()
    images = model.images(2)
    pruning = Pruning({0: 0.6}, with_skip=True, lowest=lowest)
    wanted = model.forward_pruned(images, pruning)
    assert wanted.margin == 0
    got = rs_compile.optimize(model, pruning_of(pruning), backend="eager")(images)
    oracle.assert_close(got, wanted.outputs, TOLERANCE, "ties")


@pytest.mark.parametrize("config", [Config(prefix=2), Config(rope=True, mask="buffer", norm="post")])
@torch.no_grad()
def test_kept_tokens_stay_in_order(config: Config) -> None:
    """Full-length outputs cannot show the order of the tokens within, so ask for the short ones."""
    model = GeneratedViT(Config(**{**vars(config), "output": "tokens", "depth": 3, "grid": (4, 4)}))
    images = model.images(3)
    pruning = Pruning({0: 0.7, 1: 0.7})
    wanted = model.forward_pruned(images, pruning)
    compiled = rs_compile.optimize(model, {0: 0.7, 1: 0.7}, backend="eager", token_outputs="compact")
    tokens, kept = compiled(images)
    assert kept.tolist() == wanted.kept.tolist()
    where = wanted.kept.unsqueeze(-1).expand(-1, -1, config.width)
    oracle.assert_close(tokens, wanted.outputs["output"].gather(1, where), TOLERANCE, "short tokens")


class UnusedTokens(nn.Module):
    """Computes a grid of all tokens, which would need restoring, and returns only the logits."""

    def __init__(self, inner: GeneratedViT) -> None:
        super().__init__()
        self.inner = inner
        self.conv = nn.Conv2d(inner.config.width, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.inner.embed(images)
        for block in self.inner.blocks:
            x = block(x)
        x = self.inner.norm(x)
        h, w = self.inner.config.grid
        grid = x[:, self.inner.config.prefix :].transpose(1, 2).reshape(x.shape[0], -1, h, w)
        self.conv(grid)
        return self.inner.read_out(x)


@torch.no_grad()
def test_unused_token_output() -> None:
    inner = GeneratedViT(Config(grid=(3, 4)))
    images = inner.images(2)
    got = rs_compile.optimize(UnusedTokens(inner), {0: 0.6}, backend="eager")(images)
    wanted = inner.forward_pruned(images, Pruning({0: 0.6})).outputs
    oracle.assert_close(got, wanted, TOLERANCE, "unused grid")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("output", ["class", "mean", "tokens"])
@torch.no_grad()
def test_a_broken_sample_stays_alone(output: str, bad: float) -> None:
    model = GeneratedViT(Config(output=output, depth=3))
    images = model.images(3)
    pruning = Pruning({0: 0.7, 1: 0.7})
    wanted = model.forward_pruned(images, pruning).outputs["output"]
    images[1, :, :2, :2] = bad
    assert model(images)[1].isnan().all(), "the dense model should be NaN here, or the test shows nothing"
    got = rs_compile.optimize(model, dict(pruning.keep), backend="eager")(images)
    assert got[1].isnan().all(), "the broken sample must not look healthy"
    oracle.assert_close(got[::2], wanted[::2], TOLERANCE, "neighbours of a broken sample")


class NoAttention(nn.Module):
    """Class token and patches through MLP branches only, so that a NaN stays in its token."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = GeneratedViT(Config(depth=3))

    def forward(self, images: Tensor) -> Tensor:
        x = self.inner.embed(images)
        for block in self.inner.typed_blocks():
            x = x + block.mlp(block.norm2(x))
        return self.inner.read_out(self.inner.norm(x))


@torch.no_grad()
def test_protected_tokens_stay_beside_nan_scores() -> None:
    model = NoAttention()
    images = model.inner.images(2)
    images[1] = float("nan")  # every patch of the second sample scores NaN, its class token does not
    got = rs_compile.optimize(model, {0: 0.5, 1: 0.5}, backend="eager")(images)
    wanted = model(images)
    assert wanted.isfinite().all()
    oracle.assert_close(got, wanted, TOLERANCE, "class token beside NaN patches")


def fingerprint(model: nn.Module) -> list[Any]:
    """What a caller could notice if the compiler touched the model."""
    return [
        (
            name,
            id(module),
            module.training,
            sorted(module.__dict__),
            *(list(v) for k, v in sorted(module.__dict__.items()) if "hooks" in k and hasattr(v, "__iter__")),
        )
        for name, module in model.named_modules()
    ] + [(name, id(p), p.requires_grad, p._version, p.data_ptr()) for name, p in model.named_parameters()]


@pytest.mark.parametrize("attention", ["sdpa", "division"])
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_the_given_model_is_never_modified(training: bool, attention: str) -> None:
    model = GeneratedViT(Config(attention=attention, mask="computed", rope=True)).train(training)
    model.typed_blocks()[0].attn.proj.weight.requires_grad_(False)
    images = model.images(2)
    before, values, output = fingerprint(model), copy.deepcopy(model.state_dict()), model(images)
    compiled = rs_compile.optimize(model, {0: 0.7}, backend="eager")
    compiled(images)
    compiled(images[:1])
    assert fingerprint(model) == before
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(images), output)


@torch.no_grad()
def test_optimized_module_shares_parameters_and_names() -> None:
    model = GeneratedViT(Config())
    images = model.images(2)
    compiled = rs_compile.optimize(model, {0: 0.7}, backend="eager")
    for _ in range(2):  # before the first call and after it
        state, own = compiled.state_dict(), model.state_dict()
        assert list(state) == list(own)
        assert all(state[name].data_ptr() == own[name].data_ptr() for name in own)
        compiled(images)
    before = compiled(images)
    changed = {name: value * 1.1 for name, value in model.state_dict().items()}
    compiled.load_state_dict(changed)
    assert all(torch.equal(value, changed[name]) for name, value in model.state_dict().items())
    wanted = model.forward_pruned(images, Pruning({0: 0.7})).outputs
    oracle.assert_close(compiled(images), wanted, TOLERANCE, "after load_state_dict")
    assert oracle.max_difference(compiled(images), before) > APART


@pytest.mark.parametrize("called", [False, True])
@torch.no_grad()
def test_deepcopy_is_independent(called: bool) -> None:
    model = GeneratedViT(Config())
    images = model.images(2)
    compiled = rs_compile.optimize(model, {0: 0.7}, backend="eager")
    if called:
        compiled(images)
    twin = copy.deepcopy(compiled)
    wanted = compiled(images)
    oracle.assert_close(twin(images), wanted, 0.0, "a copy")
    for parameter in twin.parameters():
        parameter.mul_(1.2)
    gap = oracle.max_difference(twin(images), wanted)
    assert gap > APART, f"the copy does not read its own parameters ({gap:.1e})"
    oracle.assert_close(compiled(images), wanted, 0.0, "the original after its copy changed")


@torch.no_grad()
def test_first_call_from_two_threads() -> None:
    model = GeneratedViT(Config(depth=3, attention="scale-after", rope=True))
    images = model.images(2)
    compiled = rs_compile.optimize(model, {0: 0.7, 1: 0.8}, backend="eager")
    results: dict[int, Tensor] = {}
    start = threading.Barrier(2)

    def call(who: int) -> None:
        start.wait()
        with torch.no_grad():
            results[who] = compiled(images)

    threads = [threading.Thread(target=call, args=(who,)) for who in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert results.keys() == {0, 1}, f"only threads {sorted(results)} returned"
    assert torch.equal(results[0], results[1])
    wanted = model.forward_pruned(images, Pruning({0: 0.7, 1: 0.8})).outputs
    oracle.assert_close(results[0], wanted, TOLERANCE, "from a thread")


@torch.no_grad()
def test_two_image_sizes() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=96, depth=2, num_classes=5, dynamic_img_size=True
    )
    oracle.randomise(model.eval())
    compiled = rs_compile.optimize(model, {0: 0.7}, backend="eager")
    pruning = Pruning({0: 0.7}, protected=1)
    generator = torch.Generator().manual_seed(0)
    for h, w in ((96, 96), (64, 112), (96, 96)):
        images = torch.randn(2, 3, h, w, generator=generator)
        wanted = oracle.timm_vit(model, images, pruning)
        oracle.assert_close(compiled(images), wanted.outputs, TOLERANCE, f"{h} x {w}")


@torch.no_grad()
def test_as_many_heads_as_samples_do_not_fix_the_batch() -> None:
    """A bias [heads, N, N] meets a value [batch, N, C]; comparing their sizes must not decide anything."""
    config = Config(
        depth=1, width=16, heads=2, grid=(3, 5), prefix=1, output="class", norm="pre", layer_scale=False, mlp="gelu",
        fused_qkv=True, attention="division", mask="buffer", position_bias=True, rope=False, parallel="inner",
        autocast_off=False, tables_no_grad=False, seed=20,
    )  # fmt: skip
    model = GeneratedViT(config).eval()
    fast = rs_compile.optimize(model, {0: 1.0}, backend="eager")
    for batch in (2, 3):
        assert torch.equal(fast(model.images(batch)), model(model.images(batch)))
    assert len(fast._plans) == 1
