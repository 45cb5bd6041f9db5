"""The captured graph is the model, or the first call refuses: what a user sees of code that tracing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import rs_compile
from passes.graph.base import Refusal


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attend(self.query(x), self.key(x), self.value(x)))
        return x + self.mlp(x)


class AsksWhetherTraced(Block):
    """Causal when it runs, not when it is traced."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=not torch.compiler.is_exporting())


class Noisy(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.rand_like(x))


class Counts(Block):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) + self.calls


class ByMask(Block):
    """torch.export takes the one channel that is picked for as many as there are."""

    def forward(self, x: Tensor) -> Tensor:
        picked: Tensor = super().forward(x * x[..., torch.arange(x.shape[-1]) == 3])
        return picked


def optimized(block: type[Block], ratio: float = 1.0, **options: Any) -> tuple[nn.Module, rs_compile.OptimizedModel]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), block(), Block()).eval()
    return model, rs_compile.optimize(model, {0: ratio}, backend="eager", **options)


def tokens(**kind: Any) -> Tensor:
    return torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)).to(**kind)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_code_that_asks_whether_it_is_traced_is_refused(ratio: float) -> None:
    _, handle = optimized(AsksWhetherTraced, ratio)
    with pytest.raises(Refusal) as refused:
        handle(tokens())
    text = str(refused.value)
    assert text.startswith("aten.linear.default (linear_9): torch.export captured something else than the model does: ")
    assert "output 0 [2, 8, 16] differs by" in text and "; up to linear_8 they agree [RSC-205]\n" in text
    assert "test_faithful.py" in text and "self.out(self.attend(" in text  # the line behind the attention
    assert "way out: let that code do the same while it is traced" in text and "verify=False" in text


def test_a_graph_that_does_not_run_is_refused() -> None:
    model, handle = optimized(ByMask)
    assert model(tokens()).shape == (2, 8, 16)
    with pytest.raises(Refusal, match="captured a graph that does not run: "):
        handle(tokens())


def test_without_verify_the_graph_is_taken_as_it_is() -> None:
    model, handle = optimized(AsksWhetherTraced, verify=False)
    assert not torch.allclose(handle(tokens()), model(tokens()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_that_is_its_graph_is_taken(dtype: torch.dtype) -> None:
    model, handle = optimized(Block)
    model.to(dtype)
    assert torch.equal(handle(tokens(dtype=dtype)), model(tokens(dtype=dtype)))
    assert handle.report().skips == ()


def test_the_comparison_leaves_the_random_numbers_where_they_were() -> None:
    model, handle = optimized(Noisy)
    torch.manual_seed(1)
    first = handle(tokens())
    torch.manual_seed(1)
    assert torch.equal(first, model(tokens()))


def test_a_model_that_writes_into_a_buffer_runs_once() -> None:
    model, handle = optimized(Counts)
    handle(tokens())
    assert model[1].calls == 1
    assert [s.reason for s in handle.report().skips if s.node == "graph"] == [
        "not compared with the model: the model writes into _1_calls, and every run would do so again"
    ]


def test_in_train_mode_nothing_is_compared_and_the_report_says_so() -> None:
    model, handle = optimized(AsksWhetherTraced)
    model.train()
    handle(tokens())
    assert "not compared with the model: in train mode" in str(handle.report())
    assert "a run may change the model (a count, a moving average)" in str(handle.report())  # it has no batch norm
    assert "statistics" not in str(handle.report())


def test_a_plan_runs_nothing() -> None:
    model, _ = optimized(AsksWhetherTraced)
    assert rs_compile.plan(model, {0: 0.5}, tokens()).skips == ()


def test_only_the_first_call_compares() -> None:
    model, handle = optimized(Block)
    runs: list[int] = []
    hook = model[0].register_forward_hook(lambda *_: runs.append(1))
    handle(tokens())
    first = len(runs)
    handle(tokens())
    assert len(runs) == first
    hook.remove()


def test_two_samples_are_compared_whatever_the_batch() -> None:
    model, handle = optimized(Block)
    seen: list[int] = []
    large = tokens().repeat(5, 1, 1)

    def note(_: nn.Module, args: Any) -> None:
        if isinstance(args[0].shape[0], int):  # not the capture's
            seen.append(args[0].shape[0])

    hook = model[0].register_forward_pre_hook(note)
    short = handle(large)
    hook.remove()
    assert torch.equal(short, model(large))
    assert seen == [2]


class Pairs(Block):
    """Four frames a clip, folded into the batch."""

    def forward(self, x: Tensor) -> Tensor:
        clips = x.view(x.shape[0] // 4, 4, *x.shape[1:])
        return super().forward(x + clips.sum((1, 2, 3), keepdim=True)[:, 0].repeat_interleave(4, 0))


def test_where_two_samples_do_not_run_all_are_compared() -> None:
    model, handle = optimized(Pairs)
    whole = torch.randn(8, 8, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="invalid for input"):
        model(whole[:2])
    assert torch.equal(handle(whole), model(whole))
