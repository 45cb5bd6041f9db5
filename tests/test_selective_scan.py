"""The scan and the convolution of a Mamba mixer against one step at a time, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench.models import selective_scan as ops

NAMES = ("u", "delta", "A", "B", "C")


def naive(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, positions: Tensor | None, reverse: bool) -> Tensor:
    """h_t = exp(k delta_t A) h_{t-1} + delta_t u_t B_t and y_t = C_t h_t, sample by sample, step by step."""
    rows = []
    for i in range(len(u)):
        where = list(range(u.shape[1])) if positions is None else positions[i].tolist()
        state, outputs, last = torch.zeros_like(A), {}, None
        for t in sorted(range(u.shape[1]), reverse=reverse):
            k = 1 if last is None else abs(where[t] - where[last])
            for _ in range(k):
                state = torch.exp(delta[i, t].unsqueeze(1) * A) * state
            state = state + torch.outer(delta[i, t] * u[i, t], B[i, t])
            outputs[t], last = state @ C[i, t], t
        rows.append(torch.stack([outputs[t] for t in range(u.shape[1])]))
    return torch.stack(rows)


def inputs(samples: int, tokens: int, channels: int, states: int, seed: int, gaps: bool) -> tuple[Any, ...]:
    """u, delta, A, B, C in float64 that want gradients, and positions among three times as many."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    steps = normal(samples, tokens, channels).abs() / 2
    tensors = [normal(samples, tokens, channels), steps, -normal(channels, states).abs()]
    tensors += [normal(samples, tokens, states), normal(samples, tokens, states)]
    shuffled = torch.rand(samples, 3 * tokens, generator=generator).argsort(1)
    positions = shuffled[:, :tokens].sort(1).values if gaps else None
    return *(t.requires_grad_() for t in tensors), positions


def check(given: tuple[Any, ...], reverse: bool) -> None:
    tensors = given[:5]
    got, wanted = ops.selective_scan(*given, reverse), naive(*given, reverse)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pairs = zip(torch.autograd.grad(got, tensors, weight), torch.autograd.grad(wanted, tensors, weight), strict=True)
    for name, (a, b) in zip(NAMES, pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@given(
    st.integers(1, 3), st.integers(1, 45), st.integers(1, 4), st.integers(1, 3), st.integers(0, 9), *[st.booleans()] * 2
)
def test_scan_is_the_recurrence(
    samples: int, tokens: int, channels: int, states: int, seed: int, gaps: bool, reverse: bool
) -> None:
    check(inputs(samples, tokens, channels, states, seed, gaps), reverse)


@pytest.mark.parametrize("block", [1, 2 * 30 * 2, 7 * 30 * 2])
def test_in_parts(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels one by one, two together, and samples two together."""
    monkeypatch.setattr(ops, "BLOCK", block)
    for reverse in (False, True):
        check(inputs(3, 30, 3, 2, 0, gaps=True), reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gaps", [False, True])
def test_gradients_by_differences_and_the_op_contract(gaps: bool, reverse: bool) -> None:
    given = (*inputs(2, 5, 2, 2, 0, gaps), reverse)
    assert torch.autograd.gradcheck(ops.selective_scan, given)
    torch.library.opcheck(ops.selective_scan, given)
    conv = (given[0], torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True))
    for bias in (torch.randn(2, dtype=torch.float64, requires_grad=True), None):
        assert torch.autograd.gradcheck(ops.causal_conv1d, (*conv, bias, reverse))
        torch.library.opcheck(ops.causal_conv1d, (*conv, bias, reverse))


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_convolution_is_torchs(tokens: int) -> None:
    x, weight, bias = torch.randn(2, tokens, 3), torch.randn(3, 1, 4), torch.randn(3)

    def causal(x: Tensor) -> Tensor:
        return F.conv1d(x.mT, weight, bias, padding=3, groups=3)[..., :tokens].mT

    torch.testing.assert_close(ops.causal_conv1d(x, weight, bias, False), causal(x))
    torch.testing.assert_close(ops.causal_conv1d(x, weight, bias, True), causal(x.flip(1)).flip(1))


def test_bfloat16_keeps_its_state_in_float32() -> None:
    given = inputs(1, 40, 2, 2, 0, gaps=False)
    low = [t.detach().bfloat16() for t in given[:5]]
    got = ops.selective_scan(*low, None, False)
    wanted = ops.selective_scan(*(t.float() for t in low), None, False)
    assert got.dtype == torch.bfloat16 and torch.equal(got, wanted.bfloat16())


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gaps", [False, True])
def test_what_mambas_kernel_is_given(gaps: bool, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout [B, D, N], forward only, one delta for both uses: the same numbers come back, gradients too."""

    def kernel(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        assert all(t.is_contiguous() for t in (u, delta, B, C))
        return naive(u.mT, delta.mT, A, B.mT, C.mT, None, False).mT

    monkeypatch.setattr(ops, "selective_scan_fn", kernel)
    given = inputs(2, 6, 3, 2, 0, gaps)
    got, wanted = ops.by_mamba(*given, reverse), naive(*given, reverse)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(
        torch.autograd.grad(got.sum(), given[:5]), torch.autograd.grad(wanted.sum(), given[:5]), strict=True
    ):
        torch.testing.assert_close(a, b)
