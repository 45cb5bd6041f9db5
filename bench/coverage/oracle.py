"""Pruning by hand on any model whose layers are modules: pruned tokens stay in place, masked and frozen.

It shares no code with the compiler and no idea either: nothing is gathered. From a scheduled layer
onwards every softmax over the tokens and every mean over them leaves out the pruned ones, and each later layer gives
them back with the value that they left with. So positions, masks, tables and outputs are the model's own.

Shapes: B samples, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from bench.coverage.sums import Sums

aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """A module that takes and gives a residual stream.

    Args:
        path: in the model.
        module: it.
        norm: the norm at its end, where there is one (post-norm): the residual sum is what the norm reads.
        tokens: the token dimension of the stream, 0 or 1.
        length: N.
    """

    path: str
    module: nn.Module = field(repr=False)
    norm: nn.Module | None = field(repr=False)
    tokens: int
    length: int


def first_tensor(value: Any) -> Tensor | None:
    """The tensor that is a layer's value, or comes first in it."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def find_layers(model: nn.Module, call: Callable[[], Any], batch: int) -> list[Layer]:
    """The layers of all encoders in the model, in the order in which they are called.

    Layers are children of one container, of one class, called once each, that take and give a stream of one shape.

    Args:
        model: any module.
        call: runs it.
        batch: B, by which the token dimension is told from that of the samples.
    """
    paths = {module: path for path, module in model.named_modules()}
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, result = first_tensor(args or tuple(kwargs.values())), first_tensor(output)
        if given is not None and result is not None:
            calls.append((module, given, result))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    ran = {module for module, _, _ in calls}
    groups: dict[tuple[str, type], list[Layer]] = {}
    for i, (module, given, result) in enumerate(calls):
        shape = tuple(result.shape)
        once = sum(m is module for m, _, _ in calls) == 1
        if result is given or not (
            once and len(shape) == 3 and tuple(given.shape) == shape and shape[:2].count(batch) == 1
        ):
            continue
        parent = paths[module].rpartition(".")[0]
        inside = [
            m
            for m, g, r in calls[:i]
            if r.data_ptr() == result.data_ptr() != g.data_ptr()  # no identity
            and tuple(g.shape) == tuple(r.shape) == shape
            and paths[m].startswith(f"{paths[module]}.")
        ]
        # a norm, not a part of the layer that ends with a sum: that has parts which run
        ends = [m for m in inside if not any(part is not m and part in ran for part in m.modules())]
        tokens = 1 - shape[:2].index(batch)
        layer = Layer(paths[module], module, ends[0] if ends else None, tokens, shape[tokens])
        groups.setdefault((parent, type(module)), []).append(layer)
    named = {key: layers for key, layers in groups.items() if len(layers) > 1}
    inner = {
        key for key in named for other in named if any(f"{key[0]}.".startswith(f"{y.path}.") for y in named[other])
    }
    return [layer for key, layers in named.items() if key not in inner for layer in layers]


def prune_by_hand(
    model: nn.Module,
    call: Callable[[], Any],
    layers: Sequence[Layer],
    keep: Mapping[int, float],
    protected: tuple[int, int],
    padding: Tensor | None = None,
    back: Collection[int] = (),
    of: Literal["mlp", "block"] = "mlp",
) -> Any:
    """What the model returns when tokens are pruned after some layers, by representation shift (L2).

    Args:
        model: it is hooked while this runs.
        call: runs it.
        layers: of one encoder.
        keep: by index into `layers` the share of tokens that stays.
        protected: how many tokens stay at either end.
        padding: [B, N], true where a token is none and goes first.
        back: layers behind which every token takes part again.
        of: whose shift: of the layer's last residual branch, ||f(x) - x||, or of the whole layer.

    Raises:
        NoSum: a scheduled layer does not end with a sum x + f(x).
    """
    state = _State(layers[0].tokens, layers[0].length, protected)
    entries: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for i, layer in enumerate(layers):

            def enter(_: Any, args: Any, kwargs: Any, i: int = i) -> None:
                given = first_tensor(args or tuple(kwargs.values()))
                assert given is not None
                entries[i] = given
                state.sums.begin(given)
                state.weighing = False

            def leave(stream: Tensor, i: int = i) -> Tensor:
                state.weighing = False
                if i in keep:
                    before, after = (entries[i], stream) if of == "block" else state.sums.of(stream)
                stream = state.frozen(stream)
                if i in back:
                    state.alive = state.values = None
                if i in keep:
                    shift = (after - before).double().norm(dim=-1)
                    state.prune(stream, shift if layers[0].tokens == 1 else shift.mT, keep[i], padding)
                return stream

            def end(_: Any, args: Any, output: Any, leave: Callable[[Tensor], Tensor] = leave) -> Any:
                if isinstance(output, Tensor):
                    return leave(output)
                return type(output)((leave(output[0]), *output[1:]))

            def sum_(_: Any, args: Any, leave: Callable[[Tensor], Tensor] = leave) -> Any:
                return (leave(args[0]), *args[1:])

            hooks = [layer.module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)]
            if layer.norm is None:
                hooks.append(layer.module.register_forward_hook(end, prepend=True))  # before the model's own
            else:
                hooks.append(layer.norm.register_forward_pre_hook(sum_))
            for hook in hooks:
                stack.callback(hook.remove)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_LeaveOut(state))
        return call()


class _State:
    """Which tokens are left, and what the others were when they left."""

    def __init__(self, dim: int, length: int, protected: tuple[int, int]) -> None:
        self.dim, self.length, self.protected = dim, length, protected
        self.alive: Tensor | None = None  # [B, N]
        self.values: Tensor | None = None  # the stream's shape
        self.weighing = False  # inside a layer, behind its softmax
        self.sums = Sums()

    def _mask(self) -> Tensor:
        assert self.alive is not None
        return (self.alive if self.dim == 1 else self.alive.mT).unsqueeze(-1)

    def frozen(self, stream: Tensor) -> Tensor:
        if self.alive is None or self.values is None:
            return stream
        return torch.where(self._mask(), stream, self.values.to(stream.dtype))

    def prune(self, stream: Tensor, score: Tensor, keep: float, padding: Tensor | None) -> None:
        n = self.length if self.alive is None else int(self.alive[0].sum())
        count = n - int((1 - Fraction(str(keep))) * n)
        score = score.clone()
        if padding is not None:
            score[padding] = -1.0
        before, behind = self.protected
        score[:, :before] = torch.inf
        score[:, self.length - behind :] = torch.inf
        if self.alive is not None:
            score[~self.alive] = -torch.inf
        best = score.sort(dim=1, descending=True, stable=True).indices[:, :count]
        alive = torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True)
        self.values = self.frozen(stream).clone()
        self.alive = alive

    def over(self, length: int) -> Tensor | None:
        """[B, length]: which entries of a dimension over the tokens are left; None if it does not run over them."""
        if self.alive is None:
            return None
        before = self.protected[0]
        if length == self.length:
            return self.alive
        if length == self.length - before:
            return self.alive[:, before:]
        if length == self.length + 1:  # a class token joins late
            return torch.cat([torch.ones_like(self.alive[:, :1]), self.alive], dim=1)
        return None


class _LeaveOut(TorchDispatchMode):
    """Takes pruned tokens out of every softmax, weighted sum and mean over tokens."""

    def __init__(self, state: _State) -> None:
        super().__init__()
        self._state = state

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten._softmax.default, aten._safe_softmax.default):
            x, dim = args[0], args[1]
            alive = self._state.over(x.shape[-1]) if dim in (-1, x.dim() - 1) and x.dim() > 2 else None
            if alive is not None and x.shape[0] % len(alive) == 0:
                mask = alive.repeat_interleave(x.shape[0] // len(alive), dim=0)
                mask = mask.view(len(mask), *[1] * (x.dim() - 2), -1)
                args = (x.masked_fill(~mask, -torch.inf), *args[1:])
                self._state.weighing = True
        elif func is aten.bmm.default and self._state.weighing:
            x = args[0]  # attention weights that something was added to after the softmax (talking heads)
            alive = self._state.over(x.shape[-1])
            if alive is not None and x.shape[0] % len(alive) == 0:
                mask = alive.repeat_interleave(x.shape[0] // len(alive), dim=0).unsqueeze(1)
                args = (x.masked_fill(~mask, 0.0), *args[1:])
        elif func is aten.mean.dim and args[0].dim() == 4 and args[0].shape[2] == 1 and len(args[1]) == 2:
            x = args[0]  # [B, C, 1, N]: adaptive pooling of [B, C, N] to one entry
            alive = self._state.over(x.shape[3])
            if alive is not None and x.shape[0] == len(alive):
                mask = alive[:, None, None]
                return x.masked_fill(~mask, 0.0).sum(args[1], keepdim=args[2]) / alive[0].sum()
        elif func in (aten.mean.dim, aten.amax.default) and args[0].dim() == 3 and len(args[1]) == 1:
            x, (dim,) = args[0], args[1]
            alive = self._state.over(x.shape[dim]) if dim % 3 == self._state.dim else None
            if alive is not None and x.shape[1 - dim % 3] == len(alive):
                mask = (alive if dim % 3 == 1 else alive.mT).unsqueeze(-1)
                keep = args[2] if len(args) > 2 else False
                if func is aten.amax.default:
                    return x.masked_fill(~mask, -torch.inf).amax(dim, keepdim=keep)
                return x.masked_fill(~mask, 0.0).sum(dim, keepdim=keep) / alive[0].sum()
        return self._state.sums.run(func, args, kwargs or {})
