"""What must hold of a place where tokens leave, between the passes that take them out."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from passes.graph.base import CompileError
from passes.graph.codes import Code
from passes.graph.layout import tokens_in
from passes.sites.site import SITE, Site


def no_open_site(gm: GraphModule) -> None:
    """No selection or merge is half-done."""
    if SITE.known(gm):
        raise CompileError("an earlier selection was not retargeted and restored", code=Code.FAULT)


def open_site(gm: GraphModule) -> None:
    """One is: `full` stands for the stream, `short` has an entry for each index."""
    site = _site(gm)
    stream, full, short, index = (n.meta["val"] for n in (site.stream, site.full, site.short, site.index))
    if (full.dtype, full.shape) != (stream.dtype, stream.shape):
        raise CompileError(f"{site.full.name} is not what it stands for, {site.stream.name}", code=Code.FAULT)
    if index.dtype != torch.int64 or index.dim() != 2:
        raise CompileError(f"{site.index.name} holds no positions [B, K]", code=Code.FAULT)
    over = [size for size, dim in zip(short.shape, site.layout, strict=True) if tokens_in(dim)]
    if over[0] != index.shape[1] or any(size != 1 for size in over[1:]) or short.dtype != stream.dtype:
        raise CompileError(f"{site.short.name} has not the tokens that {site.index.name} names", code=Code.FAULT)


def retargeted(gm: GraphModule) -> None:
    """Each op that was carried through has a compact form, of its dtype."""
    site = _site(gm)
    if site.axis is None:
        raise CompileError("the selection was not retargeted", code=Code.FAULT)
    for node in site.axis.transfers:
        if site.axis.carries(node) and node not in site.compact:
            raise CompileError(f"{node.name} runs over tokens and has no compact form", code=Code.FAULT)


def put_back_nowhere(gm: GraphModule) -> None:
    """Nothing reads what was put back at once: else part of the network still runs on every token."""
    full = _site(gm).full
    if any(node is full for node in gm.graph.nodes):
        consumers = ", ".join(user.name for user in full.users)
        raise CompileError(
            f"{full.name} puts pruned tokens back at once, and is still read by {consumers}", code=Code.FAULT
        )


def _site(gm: GraphModule) -> Site:
    if not SITE.known(gm):
        raise CompileError("no selection or merge stands open", code=Code.FAULT)
    return SITE.of(gm)
