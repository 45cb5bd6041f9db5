"""The two ops of a Mamba mixer that run along the sequence, as custom ops, and what they mean on fewer tokens.

`vim::selective_scan` is the recurrence of Mamba (Gu and Dao 2023, Eq. 2 with Algorithm 2),

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t,    y_t = C_t h_t,

and `vim::causal_conv1d` the depthwise convolution before it. Both take the tokens in dimension 1, and run from
the last token to the first where `reverse` is set. Shapes: B samples, N tokens, D channels, S states.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from passes.axes.rules import Context, Kept, Transfer, Untransferable
from passes.graph.codes import Code
from passes.graph.layout import Layout
from rs_compile import register_cost, register_token_rule

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:
    selective_scan_fn = None

CHUNK = 14  # steps that run one after another; about sqrt(197), so that there are as few again of chunks
BLOCK = 600_000  # states computed at a time: a few such tensors fit a CPU's cache
MACS_PER_STATE = 4  # exp(delta A) h, delta u B, their sum, C h: with it ViM-T has its published 1.525 GFLOPs


@torch.library.custom_op("vim::selective_scan", mutates_args=())
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, positions: Tensor | None, reverse: bool
) -> Tensor:
    """y [B, N, D] of the recurrence above, without the skip D u.

    Args:
        u: [B, N, D].
        delta: [B, N, D], after its softplus.
        A: [D, S], negative.
        B, C: [B, N, S].
        positions: [B, N] int64, ascending: where each token stood in a longer sequence. A token whose
            neighbour (on the side that the scan comes from) stood k places away decays the state k times, with
            its own delta: exp(k delta_t A). None: all are neighbours, k = 1.
        reverse: scan from the last token to the first.
    """
    if u.is_cuda and selective_scan_fn is not None:
        return by_mamba(u, delta, A, B, C, positions, reverse)
    y = torch.empty_like(u)
    u, delta, A, B, C = _wide(u, delta, A, B, C)
    steps = _steps(positions, reverse)
    for rows, channels in _blocks(u.shape, A.shape[1]):
        d = delta[rows, :, channels]
        decay = _decay(d, A[channels], steps, rows)
        inject = (d * u[rows, :, channels]).unsqueeze(-1) * B[rows].unsqueeze(2)
        states = _scan(decay, inject, reverse)
        y[rows, :, channels] = (states @ C[rows].unsqueeze(-1)).squeeze(-1)
    return y


@selective_scan.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, positions: Tensor | None, reverse: bool) -> Tensor:
    return torch.empty_like(u)


@torch.library.custom_op("vim::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, positions: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B and C. The gradient of the states is a scan as well, the other way round."""
    if grad.is_cuda and selective_scan_fn is not None:
        with torch.enable_grad():
            u, delta, A, B, C = (t.detach().requires_grad_() for t in (u, delta, A, B, C))
            y = by_mamba(u, delta, A, B, C, positions, reverse)
            du, dd, dA, dB, dC = torch.autograd.grad(y, (u, delta, A, B, C), grad)
            return du, dd, dA, dB, dC
    given = (u, delta, A, B, C)
    grad, u, delta, A, B, C = _wide(grad, *given)
    steps = _steps(positions, reverse)
    du, dd, dA, dB, dC = map(torch.zeros_like, (u, delta, A, B, C))
    for rows, channels in _blocks(u.shape, A.shape[1]):
        d, x, a, b, dy = delta[rows, :, channels], u[rows, :, channels], A[channels], B[rows], grad[rows, :, channels]
        decay = _decay(d, a, steps, rows)
        states = _scan(decay.clone(), (d * x).unsqueeze(-1) * b.unsqueeze(2), reverse)
        # the state before each token, and the decay of the token after it
        before = _shifted(states, reverse)
        g = _scan(_shifted(decay, not reverse), dy.unsqueeze(-1) * C[rows].unsqueeze(2), not reverse)
        dC[rows] += (states * dy.unsqueeze(-1)).sum(2)
        dx = (g @ b.unsqueeze(-1)).squeeze(-1)  # of delta u
        dB[rows] += (g * (d * x).unsqueeze(-1)).sum(2)
        exponent = g.mul_(before).mul_(decay)  # of steps delta A
        if steps is not None:
            exponent.mul_(steps[rows, :, None, None])
        du[rows, :, channels] = dx * d
        dd[rows, :, channels] = dx * x + (exponent * a).sum(-1)
        dA[channels] += (exponent * d.unsqueeze(-1)).sum((0, 1))
    du, dd, dA, dB, dC = (d.to(t.dtype) for d, t in zip((du, dd, dA, dB, dC), given, strict=True))
    return du, dd, dA, dB, dC


@selective_scan_backward.register_fake
def _(
    grad: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, positions: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, dd, dA, dB, dC = map(torch.empty_like, (u, delta, A, B, C))
    return du, dd, dA, dB, dC


@torch.library.custom_op("vim::causal_conv1d", mutates_args=())
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """Depthwise convolution along the tokens that reads a token and those before it (behind it in reverse).

    Args:
        x: [B, N, D].
        weight: [D, 1, K], the last tap for the token itself.
        bias: [D].
        reverse: run from the last token to the first.

    Returns:
        [B, N, D].
    """
    y = torch.zeros_like(x) if bias is None else bias.expand(x.shape).contiguous()
    for tap, part in _taps(x, weight.shape[-1], reverse):
        y.addcmul_(part, weight[:, 0, tap])
    return y


@causal_conv1d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("vim::causal_conv1d_weight", mutates_args=())
def causal_conv1d_weight(grad: Tensor, x: Tensor, taps: int, reverse: bool) -> Tensor:
    """The gradient [D, 1, taps] of the weight, from that of the result and x, both [B, N, D]."""
    return torch.stack([(grad * part).sum((0, 1)) for _, part in _taps(x, taps, reverse)], -1).unsqueeze(1)


@causal_conv1d_weight.register_fake
def _(grad: Tensor, x: Tensor, taps: int, reverse: bool) -> Tensor:
    return x.new_empty(x.shape[2], 1, taps)


def by_mamba(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, positions: Tensor | None, reverse: bool
) -> Tensor:
    """The same by mamba_ssm's kernel, which wants [B, D, N], scans forward, and takes one delta for both its uses."""
    x = u
    if (steps := _steps(positions, reverse)) is not None:
        scale = steps.unsqueeze(-1).to(delta.dtype)
        delta, x = delta * scale, u / scale
    u_, delta_, b_, c_ = (t.flip(1).mT if reverse else t.mT for t in (x, delta, B, C))
    y = selective_scan_fn(u_.contiguous(), delta_.contiguous(), A, b_.contiguous(), c_.contiguous()).mT
    return (y.flip(1) if reverse else y).to(u.dtype).contiguous()


def _wide(*values: Tensor) -> list[Tensor]:
    """The state in float32 at least: it sums over the sequence."""
    return [v if v.dtype == torch.float64 else v.float() for v in values]


def _steps(positions: Tensor | None, reverse: bool) -> Tensor | None:
    """[B, N]: how far before each token, in the direction of the scan, its neighbour stood; 1 for the first."""
    if positions is None:
        return None
    between = positions.diff(dim=1)
    return F.pad(between, (0, 1) if reverse else (1, 0), value=1)


def _blocks(shape: torch.Size, states: int) -> Iterator[tuple[slice, slice]]:
    """Parts of samples and channels that are computed at a time."""
    samples, tokens, channels = shape
    width = max(1, min(channels, BLOCK // max(1, tokens * states)))
    rows = max(1, BLOCK // max(1, tokens * states * channels))
    for i in range(0, samples, rows):
        for j in range(0, channels, width):
            yield slice(i, i + rows), slice(j, j + width)


def _decay(delta: Tensor, A: Tensor, steps: Tensor | None, rows: slice) -> Tensor:
    """exp(steps delta A), [B, N, D, S]."""
    if steps is not None:
        delta = delta * steps[rows].unsqueeze(-1)
    return (delta.unsqueeze(-1) * A).exp_()


def _shifted(x: Tensor, reverse: bool) -> Tensor:
    """Each token's entry is that of the token before it in the scan; 0 for the first."""
    out = torch.zeros_like(x)
    if reverse:
        out[:, :-1] = x[:, 1:]
    else:
        out[:, 1:] = x[:, :-1]
    return out


def _scan(decay: Tensor, states: Tensor, reverse: bool) -> Tensor:
    """h_t = decay_t h_{t-1} + states_t along dimension 1 of [B, N, D, S], in the memory of both.

    Chunks of the sequence are scanned side by side, each from a state of zero; then each chunk's last state,
    decayed, is added to the next chunk. What does not fill a chunk is a shorter one at the end.
    """
    tokens = states.shape[1]
    chunks = tokens // CHUNK
    body = chunks * CHUNK
    parts = [(v[:, :body].unflatten(1, (chunks, CHUNK)), v[:, body:].unsqueeze(1)) for v in (decay, states)]
    for a, h in zip(*parts, strict=True):
        order = range(a.shape[2])[:: -1 if reverse else 1]
        for before, t in pairwise(order):
            h[:, :, t].addcmul_(a[:, :, t], h[:, :, before])
            a[:, :, t].mul_(a[:, :, before])
    pieces = [(a[:, c], h[:, c]) for a, h in zip(*parts, strict=True) for c in range(a.shape[1])]
    pieces = [p for p in pieces if p[0].shape[1]][:: -1 if reverse else 1]
    for (_, last), (a, h) in pairwise(pieces):
        h.addcmul_(a, last[:, :1] if reverse else last[:, -1:])
    return states


def _taps(x: Tensor, taps: int, reverse: bool) -> Iterator[tuple[int, Tensor]]:
    """For each tap of a causal convolution the tokens that it reads, [B, N, D]."""
    tokens = x.shape[1]
    padded = F.pad(x, (0, 0, 0, taps - 1) if reverse else (0, 0, taps - 1, 0))
    for tap in range(taps):
        start = taps - 1 - tap if reverse else tap
        yield tap, padded[:, start : start + tokens]


def _save_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _scan_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*selective_scan_backward(grad, *ctx.saved_tensors, ctx.reverse), None, None)


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.reverse = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, weight)


def _conv_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx = causal_conv1d(grad, weight, None, not ctx.reverse)
    dw = causal_conv1d_weight(grad, x, weight.shape[-1], ctx.reverse)
    return dx, dw, grad.sum((0, 1)) if ctx.biased else None, None


selective_scan.register_autograd(_scan_gradients, setup_context=_save_scan)
causal_conv1d.register_autograd(_conv_gradients, setup_context=_save_conv)


def _sequence(node: Any, ctx: Context, inputs: tuple[Any, ...]) -> Layout:
    """The layout of the op's result, all of whose inputs run over the same tokens in dimension 1."""
    layouts = [ctx.layout(n) for n in inputs]
    first = layouts[0]
    if first is None or any(other is None or other[:2] != first[:2] for other in layouts):
        raise Untransferable("its inputs do not all run over the same tokens", code=Code.OTHER_SEQUENCE)
    if first[0] != ctx.plain(ctx.batch.size) or len(first[1]) != 1:
        raise Untransferable("runs along something else than the tokens of one sample", code=Code.EVERY_TOKEN)
    return first


def scan_rule(node: Any, ctx: Context) -> Transfer:
    """Order is kept, so the scan runs over the tokens that are left; where asked to, it decays over the gaps."""
    u, delta, _, B, C, positions, reverse = node.args
    layout = _sequence(node, ctx, (u, delta, B, C))
    if positions is not None:  # an earlier prune left them: gathered again they are those of the tokens left now
        return Transfer(layout, {positions: layout[:2]}, mixes=True, ordered=True, decay=node.args)
    return Transfer(layout, mixes=True, ordered=True, decay=(*node.args[:5], Kept(layout[1]), reverse))


def conv_rule(node: Any, ctx: Context) -> Transfer:
    """Reads the neighbours that are left."""
    return Transfer(_sequence(node, ctx, node.args[:1]), mixes=True, ordered=True)


def scan_cost(out: tuple[int, ...], u: Any, delta: Any, A: tuple[int, ...], *_: Any) -> int:
    samples, tokens, channels = out
    return MACS_PER_STATE * samples * tokens * channels * A[1]


def conv_cost(out: tuple[int, ...], x: Any, weight: tuple[int, ...], *_: Any) -> int:
    samples, tokens, channels = out
    return samples * tokens * channels * weight[-1]


register_token_rule(torch.ops.vim.selective_scan.default, scan_rule)
register_token_rule(torch.ops.vim.causal_conv1d.default, conv_rule)
register_cost(torch.ops.vim.selective_scan.default, scan_cost)
register_cost(torch.ops.vim.causal_conv1d.default, conv_cost)
