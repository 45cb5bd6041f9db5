"""The methods that a table compares: how a model is run, dense or pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rs_compile import Lowest, OptimizedModel, Random, Schedule, Score, Shift, ToMe, VidTLDR, Ward
from rs_compile.compiling import Backend, Options
from rs_compile.timing import compiled

BASE, SDPA, COMPILED, COMPILED_WRITTEN = "base", "base-sdpa", "base-compiled", "base-compiled-written"
ATTENTION, RANDOM, LOWEST, OURS = "attention", "random", "lowest", "ours"
VID_TLDR, VID_TLDR_SHIFT, TOME, STREAM, WARD = "vid-tldr", "vid-tldr-shift", "tome", "stream", "ward"
DENSE, PRUNED = (BASE, SDPA, COMPILED), (ATTENTION, RANDOM, LOWEST, OURS)
METHODS = {
    BASE: "base, eager attention",
    SDPA: "base, SDPA",
    COMPILED: "base, torch.compile",
    COMPILED_WRITTEN: "base, torch.compile, eager attention",
    ATTENTION: "attention score",
    RANDOM: "random",
    LOWEST: "lowest shift kept",
    OURS: "ours",
    VID_TLDR: "vid-TLDR",
    VID_TLDR_SHIFT: "vid-TLDR with shift",
    TOME: "ToMe",
    STREAM: "merging on the stream",
    WARD: "merging by Ward's cost",
}


@dataclass(frozen=True)
class Method:
    """One way to run a model.

    Args:
        name: in rows and options.
        schedule: what is pruned; None for the model itself.
        fused: the model itself calls SDPA; False for attention written out, as published.
        compiled: the model itself goes through torch.compile.
        options: further arguments of `rs_compile.optimize`.
        at: what tells methods of the same name apart, {"layer": 3}.
    """

    name: str
    schedule: Schedule | None = None
    fused: bool = True
    compiled: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    at: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name with what tells it apart."""
        return ", ".join([self.name, *(f"{key} {value}" for key, value in self.at.items())])

    def apply(self, model: nn.Module, backend: Backend) -> Callable[..., Any]:
        """The model, run this way; its parameters are shared.

        Args:
            model: in eval mode.
            backend: torch.compile's; with "eager" nothing is compiled.
        """
        if self.schedule is not None:
            # as published: papers count what the layers behind the last attention do with every token
            options = {"backend": backend, "drop_unread": False, **self.options}
            return OptimizedModel(model, Options(self.schedule, **options))
        twin = with_attention(model, self.fused)
        return compiled(twin, backend) if self.compiled else twin


def with_attention(model: nn.Module, fused: bool) -> nn.Module:
    """A copy on the same parameters whose attention calls SDPA (`fused`) or writes softmax(QK^T)V out.

    The switch is the attribute `fused_attn` that timm's attention layers and `bench.models.umt`'s have, and a method
    of transformers' models.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    layers: Iterable[Any] = twin.modules()
    for layer in layers:
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = fused
    if callable(switch := getattr(twin, "set_attn_implementation", None)):
        switch("sdpa" if fused else "eager")
    return twin


def dense(name: str) -> Method:
    """The model itself, as published ("base"), with SDPA, or compiled with either."""
    return Method(name, fused=name not in (BASE, COMPILED_WRITTEN), compiled=name in (COMPILED, COMPILED_WRITTEN))


def pruned(
    name: str,
    keep: Mapping[int, float],
    attention: Score,
    eager_everywhere: bool = False,
    at: Mapping[str, Any] | None = None,
    multiple_of: int = 1,
) -> Method:
    """The model with tokens pruned.

    Args:
        name: "attention", "random", "lowest" or "ours".
        keep: block -> keep ratio.
        attention: which attention score "attention" is: Eq. 2 with a class token, Eq. 3 without.
        eager_everywhere: "attention" writes every block's attention out, as published baselines do, not
            only that of the blocks that are scored.
        at: see `Method`.
        multiple_of: of "ours", see `Schedule`.
    """
    schedule = {
        ATTENTION: Schedule(keep, score=attention),
        RANDOM: Schedule(keep, score=Random()),
        LOWEST: Schedule(keep, score=Lowest()),
        OURS: Schedule(keep, multiple_of=multiple_of),
    }[name]
    options = {"explicit_attention": True} if eager_everywhere and name == ATTENTION else {}
    return Method(name, schedule, options=options, at=at or {})


def merging(name: str, merge: Mapping[int, int | float], at: Mapping[str, Any] | None = None) -> Method:
    """The model with tokens merged, with size bias.

    Args:
        name: "vid-tldr" (as published: its attention map, every attention written out, uncompiled), "vid-tldr-shift"
            (the MLP's shift in place of the map), "tome", "stream" or "ward".
        merge: block -> how many tokens, or which share of them, merge.
        at: see `Method`.
    """
    schedule = {
        VID_TLDR: Schedule(merge=merge, by=VidTLDR()),
        VID_TLDR_SHIFT: Schedule(merge=merge, by=VidTLDR(Shift())),
        TOME: Schedule(merge=merge, by=ToMe()),
        STREAM: Schedule(merge=merge),
        WARD: Schedule(merge=merge, by=Ward()),
    }[name]
    published = {"explicit_attention": True, "backend": "eager"}
    return Method(name, schedule, options=published if name == VID_TLDR else {}, at=at or {})
