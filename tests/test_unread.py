"""`drop_unread` and `outputs`, as a user meets them."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import timm
import torch
import transformers
import zoo
from schedules import merger_of
from torch import Tensor, nn

import rs_compile
from passes.graph.codes import Code
from rs_compile import OutputError, Schedule, optimize, plan

SMALL: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "vocab_size": 99,
    "max_position_embeddings": 16,
}  # fmt: skip
IDS = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))
IDS[0, 7] = IDS[1, 11] = IDS[2, 3] = 98
MASK = (torch.arange(12) < torch.tensor([[9], [12], [5]])).long()


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_gflops_of_deit_small() -> None:
    with torch.device("meta"):
        model, image = timm.create_model("deit_small_patch16_224").eval(), torch.empty(1, 3, 224, 224)
    dense, short = (plan(model, {}, image, drop_unread=drop) for drop in (False, True))
    rest, d, hidden, n = 196, 384, 1536, 197  # tokens that are not read
    macs = rest * (2 * d * d + 2 * d * hidden + 2 * n * d)  # queries and projection, MLP, attention
    assert dense.macs - short.macs == dense.blocks[11].macs - short.blocks[11].macs == macs
    assert (round(dense.flops / 1e9, 3), round(short.flops / 1e9, 2)) == (4.608, 4.29)
    assert short.unread_flops == dense.flops - short.flops and dense.unread_flops == 0
    assert "unread tokens: 0.319 GFLOPs (6.9%) left out behind the last attention" in str(short)
    assert "unread" not in str(dense)


@pytest.mark.parametrize("name", ["deit_tiny", "deit_tiny_distilled", "dinov2_reg4", "torchvision_vit"])
@pytest.mark.parametrize("lower", [None, True])
def test_the_model_itself_for_a_class_token(name: str, lower: bool | None) -> None:
    entry = zoo.ZOO[name]
    model, x = entry.model().double(), entry.images(3).double()
    optimized = optimize(model, {}, backend="eager", drop_unread=True, lower_attention=lower)
    with torch.no_grad():
        close(optimized(x), model(x))
    report = optimized.report()
    assert report.unread_flops > 0.19 * report.flops_dense


@pytest.mark.parametrize("name", ["siglip", "vit_average", "vit_all_tokens"])
def test_means_latents_and_all_tokens_are_left_alone(name: str) -> None:
    entry = zoo.ZOO[name]
    model, x = entry.model(), entry.images(2)
    optimized = optimize(model, {}, backend="eager", drop_unread=True)
    with torch.no_grad():
        assert torch.equal(optimized(x), model(x))
    assert optimized.report().unread_flops == 0


def test_on_by_default_where_tokens_leave_and_equal_to_the_pruned_model() -> None:
    entry = zoo.ZOO["deit_tiny"]
    model, x = entry.model().double(), entry.images(3).double()
    with torch.no_grad():
        whole, short, dense = (
            optimize(model, schedule, backend="eager", **options)
            for schedule, options in (({0: 0.7}, {"drop_unread": False}), ({0: 0.7}, {}), ({0: 1.0}, {}))
        )
        close(short(x), whole(x))
        assert torch.equal(dense(x), model(x))
    assert short.report().unread_flops > 0 == whole.report().unread_flops == dense.report().unread_flops
    assert short.report().flops + short.report().unread_flops == whole.report().flops
    blocks = zip(short.report().blocks, whole.report().blocks, strict=True)
    assert [a.macs < b.macs for a, b in blocks] == [False, False, True]


@pytest.mark.parametrize("merger", ["stream", "tome"])
def test_behind_a_merge_with_size_bias(merger: Any) -> None:
    entry = zoo.ZOO["deit_tiny"]
    model, x = entry.model().double(), entry.images(3).double()
    schedule = Schedule(merge={0: 8, 1: 5}, by=merger_of(merger))
    with torch.no_grad():
        whole, short = (optimize(model, schedule, backend="eager", drop_unread=drop) for drop in (False, None))
        close(short(x), whole(x))
    assert short.report().unread_flops > 0


def encoder(kind: str, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    if kind == "bert":
        config: Any = transformers.BertConfig(**SMALL, attn_implementation=attention)
        return oracle.randomise(transformers.BertModel(config).eval()).double()
    config = transformers.CLIPTextConfig(**SMALL, eos_token_id=98, attn_implementation=attention)
    return oracle.randomise(transformers.CLIPTextModel(config).eval()).double()


@pytest.mark.parametrize(
    ("kind", "attention"), [("bert", "sdpa"), ("bert", "eager"), ("clip", "sdpa"), ("clip", "eager")]
)
@pytest.mark.parametrize("mask", [None, MASK])
def test_text_towers_for_their_pooler_alone(kind: str, attention: str, mask: Tensor | None) -> None:
    model = encoder(kind, attention)
    given = {"input_ids": IDS} | ({} if mask is None else {"attention_mask": mask})
    optimized = optimize(model, {}, backend="eager", drop_unread=True, outputs=("pooler_output",))
    with torch.no_grad():
        got, want = optimized(**given), model(**given)
    close(got.pooler_output, want.pooler_output)
    assert type(got) is type(want) and got.last_hidden_state is None
    report = optimized.report()
    assert report.unread_flops > 0.25 * report.flops_dense


def test_without_outputs_the_tokens_are_read() -> None:
    optimized = optimize(encoder("bert"), {}, backend="eager", drop_unread=True)
    with torch.no_grad():
        assert optimized(input_ids=IDS).last_hidden_state.shape == (3, 12, 48)
    assert optimized.report().unread_flops == 0


class Several(nn.Module):
    """Returns a dict, a tuple or one tensor; each head costs 8 x 4 MACs."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.a, self.b = form, nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        if self.form == "one":
            return self.a(x)
        return {"a": self.a(x), "b": self.b(x)} if self.form == "dict" else (self.a(x), self.b(x))


@pytest.mark.parametrize(("form", "wanted", "other"), [("dict", "b", "a"), ("dict", 1, "a"), ("tuple", 1, 0)])
def test_outputs_by_name_and_place(form: str, wanted: str | int, other: str | int) -> None:
    model, x = Several(form), torch.randn(2, 8)
    optimized = optimize(model, {}, backend="eager", outputs=(wanted,))
    got, at = optimized(x), "b" if form == "dict" else 1
    assert torch.equal(got[at], model.b(x)) and got[other] is None
    assert optimized.report().macs == optimized.report().macs_dense == 8 * 4  # the other head is gone


@pytest.mark.parametrize(
    ("form", "outputs", "text"),
    [
        ("dict", ("c",), "outputs names 'c', and Several returns 'a', 'b'"),
        ("tuple", (2,), "outputs names 2, and Several returns 0, 1"),
        ("tuple", ("a", 0), "outputs names 'a', and Several returns 0, 1"),
        ("one", (0,), "outputs names 0, and Several returns one value; leave outputs out"),
    ],
)
def test_outputs_that_are_not_there(form: str, outputs: Any, text: str) -> None:
    with pytest.raises(OutputError) as caught:
        optimize(Several(form), {}, backend="eager", outputs=outputs)(torch.randn(2, 8))
    assert caught.value.text == text and caught.value.code == Code.OUTPUTS


@pytest.mark.parametrize("outputs", [(), (1.5,), (True,), {"a": 1}])
def test_outputs_that_cannot_be_meant(outputs: Any) -> None:
    with pytest.raises(OutputError, match="write names or places of what the model returns, like"):
        optimize(Several("dict"), {}, outputs=outputs)


def test_drop_unread_is_a_flag() -> None:
    flag: Any = "yes"
    with pytest.raises(ValueError, match="drop_unread is 'yes'; write True or False, or leave it out"):
        optimize(Several("dict"), {}, drop_unread=flag)
    assert rs_compile.OutputError is OutputError


@pytest.mark.inductor
def test_compiled() -> None:
    entry = zoo.ZOO["deit_tiny"]
    model, x = entry.model(), entry.images(2)
    with torch.no_grad():
        got = optimize(model, {}, drop_unread=True)(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)
    assert optimize(Several("dict"), {}, outputs="a")(torch.randn(2, 8))["b"] is None
