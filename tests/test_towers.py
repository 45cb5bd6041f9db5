"""`optimize_tower` on vision-language models: the same model around a tower that sees fewer tokens.

By hand: hooks on the layers of the model's own tower take tokens out and put them back, chosen in a Python loop.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from oracle import Stream, distance
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from vision_language import CASES, IMAGE, Case, idefics3, internvl, llava, paligemma, qwen2_5_vl, smolvlm

from rs_compile import OptimizedModel, Refusal, TowerError, optimize, optimize_tower

KEEP = {0: 0.75, 1: 0.5}
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def optimized(case: Case, schedule: Any, **options: Any) -> Any:
    return optimize_tower(case.model, schedule, backend="eager", **case.options, **options)


def logits(model: Any, case: Case) -> Tensor:
    out: Tensor = model(**case.inputs).logits
    return out


@torch.no_grad()
@pytest.mark.parametrize("make", CASES)
def test_with_every_token_left_it_is_the_model(make: Callable[[], Case]) -> None:
    case = make()
    fast, wanted = optimized(case, {0: 1.0}), logits(case.model, case)
    assert type(fast) is type(case.model)
    assert isinstance(fast.get_submodule(case.path), OptimizedModel)
    assert not any(isinstance(m, OptimizedModel) for m in case.model.modules())
    assert torch.equal(logits(fast, case), wanted)
    assert torch.equal(fast.generate(**case.inputs, **GREEDY), case.model.generate(**case.inputs, **GREEDY))
    own = {name: value.data_ptr() for name, value in case.model.state_dict().items()}
    assert {name: value.data_ptr() for name, value in fast.state_dict().items()} == own
    assert list(dict(fast.named_parameters())) == list(dict(case.model.named_parameters()))


@torch.no_grad()
@pytest.mark.parametrize("make", CASES)
def test_a_pruned_tower_is_what_optimize_makes_of_it(make: Callable[[], Case]) -> None:
    case, seen = make(), list[Any]()
    before = logits(case.model, case)
    fast = optimized(case, KEEP)
    tower = fast.get_submodule(case.path)
    # a copy, because the model writes its features into what the tower returns
    tower.register_forward_hook(lambda _, args, kwargs, out: seen.append((args, kwargs, dict(out))), with_kwargs=True)
    got = logits(fast, case)
    ((args, kwargs, out),) = seen
    wanted = optimize(case.model.get_submodule(case.path), KEEP, backend="eager", **case.options)(*args, **kwargs)
    dense = case.model.get_submodule(case.path)(*args, **kwargs)
    assert torch.equal(out["last_hidden_state"], wanted.last_hidden_state)
    assert out["last_hidden_state"].shape == dense.last_hidden_state.shape
    assert (got - before).abs().max() > 1e-2
    assert fast.generate(**case.inputs, **GREEDY).shape == (len(got), got.shape[1] + 4)
    assert torch.equal(logits(case.model, case), before)
    rows = tower.report().blocks
    assert rows[3].tokens_in < 0.5 * rows[0].tokens_in


def prune_by_hand(layers: Any, norm: str, keep: dict[int, float], protected: int, back: int) -> None:
    """Hooks the layers so that tokens leave behind some and are back behind another.

    Args:
        norm: the name of the norm in front of a layer's MLP.
        protected: so many tokens in front stay.
    """
    state: dict[str, Any] = {}

    def middle(_: nn.Module, args: Any) -> None:
        state["middle"] = args[0]

    def end(i: int, _: nn.Module, args: Any, out: Tensor) -> Tensor:
        stream = state["stream"] = state.get("stream", Stream(out))
        stream.tokens = out
        if i in keep:
            stream.prune(distance(out - state["middle"], state["middle"], "l2"), keep[i], protected)
        restored: Tensor = stream.restored()
        return restored if i == back else stream.tokens

    for i, layer in enumerate(layers[: back + 1]):
        getattr(layer, norm).register_forward_pre_hook(middle)
        layer.register_forward_hook(partial(end, i))


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "layers", "norm", "protected", "back"),
    [
        (llava, "encoder.layers", "layer_norm2", 1, 2),  # it reads the output of the last layer but one
        (internvl, "encoder.layer", "layernorm_after", 1, 3),
        (paligemma, "encoder.layers", "layer_norm2", 0, 3),
        (idefics3, "encoder.layers", "layer_norm2", 0, 3),
        (smolvlm, "encoder.layers", "layer_norm2", 0, 3),
    ],
)
def test_every_image_token_is_back_in_its_place(
    make: Callable[[], Case], layers: str, norm: str, protected: int, back: int
) -> None:
    got = logits(optimized(case := make(), KEEP), case)
    by_hand = make()
    tower = by_hand.model.get_submodule(by_hand.path)
    prune_by_hand(tower.get_submodule(layers), norm, KEEP, protected, back)
    torch.testing.assert_close(got, logits(by_hand.model, by_hand), atol=1e-9, rtol=0)


@torch.no_grad()
def test_padded_images_of_samples_of_several_images() -> None:
    case = smolvlm()
    images = torch.randn(2, 2, 3, 16, 16).double()
    images[1, 1] = 0  # the second sample has one
    mask = torch.ones(2, 2, 16, 16, dtype=torch.bool)
    mask[0, 1, :, 8:] = False
    ids = torch.randint(4, 50, (2, 12))
    ids[0, 1:9], ids[1, 1:5] = IMAGE, IMAGE
    inputs = {"input_ids": ids, "pixel_values": images, "pixel_attention_mask": mask}
    case = case._replace(inputs=inputs)
    assert torch.equal(logits(optimized(case, {0: 1.0}), case), logits(case.model, case))
    assert logits(optimized(case, KEEP), case).isfinite().all()


@torch.no_grad()
def test_qwen2_5_vl_with_several_images_is_refused() -> None:
    case = qwen2_5_vl()
    case.inputs["image_grid_thw"] = torch.tensor([[1, 2, 6], [1, 2, 6]])
    with pytest.raises(Refusal) as error:
        optimized(case, KEEP)(**case.inputs)
    assert "way out: call the model with one image" in str(error.value)


@torch.no_grad()
def test_copies_and_pickles_are_models_of_their_own() -> None:
    case = paligemma()
    fast = optimized(case, KEEP)
    wanted = logits(fast, case)
    copies = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
    for parameter in case.model.parameters():
        parameter.mul_(2)
    assert not torch.equal(logits(fast, case), wanted)
    for other in copies:
        assert torch.equal(logits(other, case), wanted)
        assert other.model.vision_tower.report().macs == fast.model.vision_tower.report().macs


@torch.no_grad()
def test_moves_act_on_both() -> None:
    case = llava()
    fast = optimized(case, {0: 1.0})
    logits(fast, case)
    fast.bfloat16()
    case.inputs["pixel_values"] = case.inputs["pixel_values"].bfloat16()
    assert case.model.dtype == fast.dtype == torch.bfloat16
    assert torch.equal(logits(fast, case), logits(case.model, case))
    case.model.to("meta")
    assert {p.device.type for p in fast.parameters()} == {b.device.type for b in fast.buffers()} == {"meta"}


def test_gradients_reach_the_tower() -> None:
    case = paligemma()
    logits(optimized(case, KEEP), case).square().sum().backward()
    grads = [p.grad for p in case.model.model.vision_tower.parameters()]
    assert all(g is not None and bool(g.abs().sum() > 0) for g in grads)


@torch.no_grad()
def test_hooks_run_on_the_copy_and_new_ones_on_one_of_the_two() -> None:
    case, ran = paligemma(), list[str]()
    case.model.register_forward_hook(lambda *_: ran.append("before"))
    fast = optimized(case, KEEP)
    fast.register_forward_hook(lambda *_: ran.append("copy"))
    case.model.model.register_forward_hook(lambda *_: ran.append("given"))
    logits(fast, case)
    assert ran == ["before", "copy"]
    logits(case.model, case)
    assert ran == ["before", "copy", "given", "before"]


@torch.no_grad()
def test_forward_as_accelerate_replaces_it_leads_to_the_optimized_tower() -> None:
    case = paligemma()
    wanted = logits(optimized(case, KEEP), case)
    for module in (case.model, case.model.model):
        add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
    assert torch.equal(logits(optimized(case, KEEP), case), wanted)


@torch.no_grad()
def test_a_model_wrapped_by_peft() -> None:
    case = paligemma()
    wrapped = get_peft_model(case.model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    assert torch.equal(logits(optimized(case._replace(model=wrapped), {0: 1.0}), case), logits(wrapped, case))


class Two(nn.Module):
    """Two towers, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.side = paligemma().model.model.vision_tower, nn.Module()
        self.side.vision_model, self.same = llava().model.model.vision_tower, self.visual

    def forward(self, x: Tensor) -> Tensor:
        both: Tensor = self.visual(x).last_hidden_state + self.same(x).last_hidden_state
        return both + self.side.vision_model(x).last_hidden_state[:, 1:]


@torch.no_grad()
def test_of_several_towers_one_is_named_and_stands_wherever_it_stood() -> None:
    model, x = Two().eval(), torch.randn(2, 3, 16, 16).double()
    with pytest.raises(TowerError) as error:
        optimize_tower(model, KEEP)
    text = (
        "Two has 2 vision towers: visual, side.vision_model [RSC-103]\n"
        '  way out: optimize_tower(model, schedule, tower="visual"), and the same on the result for another'
    )
    assert str(error.value) == text
    fast: Any = optimize_tower(model, {0: 1.0}, tower="visual", backend="eager")
    assert fast.visual is fast.same and fast.side is model.side
    both: Any = optimize_tower(fast, {0: 1.0}, tower="side.vision_model", backend="eager")
    assert isinstance(both.visual, OptimizedModel) and isinstance(both.side.vision_model, OptimizedModel)
    assert torch.equal(both(x), model(x))


def test_what_cannot_be_optimized_says_what_to_do() -> None:
    case = paligemma()
    with pytest.raises(TowerError) as error:
        optimize_tower(case.model.model.vision_tower, KEEP)
    assert str(error.value) == (
        "SiglipVisionModel has no module named vision_tower, visual, vision_model, vision_encoder, image_tower"
        " [RSC-103]\n"
        '  way out: optimize_tower(model, schedule, tower="path.to.it"), or optimize(model, schedule) if it is the '
        "tower itself"
    )
    for path, what in (("model.eyes", "no module of it"), ("", "the model itself")):
        with pytest.raises(TowerError, match=f"tower is '{path}', which is {what}"):
            optimize_tower(case.model, KEEP, tower=path)
    with pytest.raises(ValueError, match="the language model reads every image token"):
        optimized(case, KEEP, token_outputs="compact")
    with pytest.raises(TypeError, match="optimized already"):
        optimize_tower(optimized(case, KEEP), KEEP)
    with pytest.raises(TypeError, match="not str; pass the model itself"):
        name: Any = "model"
        optimize_tower(name, KEEP)
    own = case.model.forward
    case.model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(TowerError, match="forward was replaced on the object, by code"):
        optimized(case, KEEP)
