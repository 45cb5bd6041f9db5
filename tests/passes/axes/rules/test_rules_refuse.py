"""What the transfer rules decline, of x [B, N, C] = [3, 6, 8], in their own words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import axis_from_input, graph_of, leaves, refusals
from torch import Tensor

from passes.graph.base import Refusal

Op = Callable[..., Any]

NORMALISED = "sums over tokens with weights that no softmax over tokens has normalised"
COUNTS = "a reduction over tokens that depends on how many there are"
NO_RULE = "no rule says what this op does to a shorter sequence of tokens"
ALONE = "rows or columns of the tokens' grid alone"
PICKS = "picks from tokens that are folded with another dimension"


def grid(x: Tensor) -> Tensor:
    """[B, 6, C] as two rows of three columns."""
    return x.reshape(-1, 2, 3, x.shape[-1])


def heads(x: Tensor) -> Tensor:
    """[B, 6, 8] as two heads [B, 2, 6, 4]."""
    return x.reshape(-1, 6, 2, 4).transpose(1, 2)


SAMPLES = "sums over the samples of the batch"
REFUSES: dict[str, tuple[Op, str, int]] = {  # the op, the reason, the prefix
    "product over samples": (lambda x: x.permute(1, 2, 0) @ x.transpose(0, 1), SAMPLES, 0),
    "einsum over samples": (lambda x: torch.einsum("bnc,bnd->ncd", x, x), SAMPLES, 0),
    "attention over samples": (
        lambda x: F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3),
        "attends over the samples of the batch",
        0,
    ),
    "pointwise: other sequences": (
        lambda x: x[:, 1:] + x[:, :-1],
        "takes tokens 0 to 5 of 6, some of which may be pruned",
        1,
    ),
    "pointwise: two sequences": (
        lambda x: torch.cat([x[:, :1], x], 1)[:, :6] + x,
        "takes tokens 0 to 6 of 7, some of which may be pruned",
        1,
    ),
    "pointwise: sequences of other pieces": (
        lambda x: torch.cat([x, torch.ones(x.shape[0], 1, 8)], 1) + torch.cat([torch.ones(x.shape[0], 1, 8), x], 1),
        "two different sequences of tokens meet",
        0,
    ),
    "pointwise: foldings": (
        lambda x: x.reshape(-1, 6, 2, 4).transpose(1, 2).flatten(1, 2) + x.reshape(-1, 6, 2, 4).flatten(1, 2),
        "tokens are folded with different dimensions",
        0,
    ),
    "pointwise: samples of another order": (
        lambda x: heads(x).flatten(0, 1) * heads(x).transpose(0, 1).flatten(0, 1),
        "lets the samples of the batch meet, and each keeps tokens of its own",
        0,
    ),
    "attention: samples of another order": (
        lambda x: F.scaled_dot_product_attention(heads(x).flatten(0, 1), *[heads(x).transpose(0, 1).flatten(0, 1)] * 2),
        "lets the samples of the batch meet, and each keeps tokens of its own",
        0,
    ),
    "attention: foldings": (
        lambda x: F.scaled_dot_product_attention(x[..., :4], heads(x).flatten(1, 2), x.reshape(-1, 12, 4)),
        "tokens are folded with different dimensions",
        0,
    ),
    "attention: a mask of another sequence": (
        lambda x: F.scaled_dot_product_attention(
            x, *[torch.cat([x.mean(1, True), x], 1)] * 2, torch.cat([x, x.mean(1, True)], 1).mean(-1)[:, None]
        ),
        "two different sequences of tokens meet",
        0,
    ),
    "product: foldings": (
        lambda x: heads(x).mean(-1).softmax(-1).flatten(1)[:, None] @ x.reshape(-1, 12, 4),
        "tokens are folded with different dimensions",
        0,
    ),
    "einsum: foldings": (
        lambda x: torch.einsum("bn,bnc->bc", heads(x).mean(-1).softmax(-1).flatten(1), x.reshape(-1, 12, 4)),
        "tokens are folded with different dimensions",
        0,
    ),
    "product: a bias of tokens alone": (
        lambda x: torch.baddbmm(x, torch.ones(x.shape[0], 6, 2), torch.ones(x.shape[0], 2, 8) * x.mean(1, True)),
        "tokens meet what does not run over them",
        0,
    ),
    "linear over tokens": (
        lambda x: F.linear(x.transpose(1, 2), torch.ones(6, 6)),
        "a linear layer over the tokens, of a fixed size",
        0,
    ),
    "linear over tokens and channels": (
        lambda x: F.linear(x.flatten(1), torch.ones(2, 48)),
        "a linear layer over the tokens, of a fixed size",
        0,
    ),
    "weight from tokens": (
        lambda x: F.linear(torch.ones(2, 8), x.flatten(0, 1)),
        "only a side input of it carries tokens",
        0,
    ),
    "matmul over tokens": (lambda x: torch.ones(6, 6) @ x, NORMALISED, 0),
    "covariance": (lambda x: x.transpose(1, 2) @ x, NORMALISED, 0),
    "linear attention": (lambda x: x.softmax(-1) @ (x.relu().mT @ x), NORMALISED, 0),
    "einsum over tokens": (lambda x: torch.einsum("bnc,bnd->bcd", x, x), NORMALISED, 0),
    "einsum with ellipsis": (
        lambda x: torch.einsum("...c,c->...", x, torch.ones(8)),
        "an einsum with an ellipsis or without an arrow",
        0,
    ),
    "matmul with a vector": (lambda x: x @ torch.ones(8), "a product with a vector", 0),
    "conv1d of three": (
        lambda x: F.conv1d(x.mT, torch.ones(8, 8, 3), padding=1),
        "a convolution over the sequence of tokens",
        0,
    ),
    "keys and values apart": (
        lambda x: F.scaled_dot_product_attention(x, x, torch.ones(x.shape[0], 6, 8)),
        "keys and values belong to different sequences",
        0,
    ),
    "slopes per token": (
        lambda x: F.prelu(x, torch.arange(6.0)),
        "a slope for each entry of what runs over the token axis",
        0,
    ),
    "causal across": (
        lambda x: F.scaled_dot_product_attention(x, x[:, 1:], x[:, 1:], is_causal=True),
        "causal attention between different sequences",
        1,
    ),
    "attention over channels": (
        lambda x: F.scaled_dot_product_attention(x.mT, x.mT, x.mT),
        "the channels of attention runs over the token axis",
        0,
    ),
    "layer_norm over tokens": (lambda x: F.layer_norm(x, [6, 8]), "a norm runs over the token axis", 0),
    "batch_norm in training": (
        lambda x: F.batch_norm(x.mT, None, None, training=True),
        "batch norm in training mode, whose statistics run over tokens",
        0,
    ),
    "batch_norm over tokens": (
        lambda x: F.batch_norm(x, torch.ones(6), torch.ones(6)),
        "batch norm runs over the token axis",
        0,
    ),
    "group_norm": (lambda x: F.group_norm(x.mT, 2), NO_RULE, 0),
    "sum": (lambda x: x.sum(1), COUNTS, 0),
    "standard deviation": (lambda x: x.std(1), COUNTS, 0),
    "norm over tokens": (lambda x: torch.linalg.vector_norm(x, dim=1), COUNTS, 0),
    "position of the maximum": (lambda x: x.argmax(1), COUNTS, 0),
    "mean of the batch": (lambda x: x.mean(0), "a reduction runs over the samples of the batch", 0),
    "mean folded": (lambda x: x.flatten(1).mean(1), COUNTS, 0),
    "softmax folded": (
        lambda x: x.flatten(1).softmax(1),
        "a softmax over tokens that are folded with another dimension",
        0,
    ),
    "softmax over samples": (lambda x: x.softmax(0), "a softmax runs over the samples of the batch", 0),
    "cumsum over tokens": (lambda x: x.cumsum(1), "an op along a dimension that runs over the token axis", 0),
    "topk": (lambda x: x.topk(2, 1).values, NO_RULE, 0),
    "sort": (lambda x: x.sort(1).values, NO_RULE, 0),
    "pool to two": (lambda x: F.adaptive_avg_pool1d(x.mT, 2), "pools tokens into more than one", 0),
    "weights and something else": (lambda x: (x[..., :1].softmax(1) + x).sum(1), COUNTS, 0),
    "weights and one": (lambda x: (x[..., :1].softmax(1) + 1).sum(1), COUNTS, 0),
    "squared weights": (lambda x: (x[..., :1].softmax(1) ** 2).sum(1), COUNTS, 0),
    "weights times themselves": (lambda x: ((w := x[..., :1].softmax(1)) * w).sum(1), COUNTS, 0),
    "weights times others": (lambda x: (x[..., :1].softmax(1) * x[..., 1:2].softmax(1)).sum(1), COUNTS, 0),
    "one over weights": (lambda x: (1 / x[..., :1].softmax(1)).sum(1), COUNTS, 0),
    "weights of another sequence": (
        lambda x: (
            (x @ torch.cat([x, x.new_ones(x.shape[0], 1, 8)], 1).mT).softmax(-1)
            @ torch.cat([x.new_ones(x.shape[0], 1, 8), x], 1)
        ),
        "two different sequences of tokens meet",
        0,
    ),
    "einsum of two sequences": (
        lambda x: torch.einsum(
            "bnc,bnd->bncd",
            torch.cat([x, x.new_ones(x.shape[0], 1, 8)], 1),
            torch.cat([x.new_ones(x.shape[0], 1, 8), x], 1),
        ),
        "two different sequences of tokens meet",
        0,
    ),
    "no weights below a limit": (lambda x: ((x @ x.mT).softmax(-1) > 0.1).to(x.dtype) @ x, NORMALISED, 0),
    "slice in the middle": (lambda x: x[:, 1:3], "takes tokens 1 to 3 of 6, some of which may be pruned", 1),
    "slice of a prefix too long": (
        lambda x: x[:, :2],
        "takes tokens 0 to 2 of 6, some of which may be pruned",
        1,
    ),
    "every other": (lambda x: x[:, ::2], "takes every other token", 0),
    "slice folded": (lambda x: x.flatten(1)[:, 8:], PICKS, 0),
    "samples": (lambda x: x[1:], "picks samples of the batch", 0),
    "select": (lambda x: x[:, 1], "reads token 1 of 6, which may be pruned", 1),
    "last token": (lambda x: x[:, -1], "reads token 5 of 6, which may be pruned", 1),
    "one sample": (lambda x: x[0], "selects an entry, which runs over the samples of the batch", 0),
    "single weights": (lambda x: (x @ x.mT).softmax(-1)[..., 0], "picks single attention weights", 1),
    "split": (lambda x: x.split(2, 1)[0], "splits the tokens at 2 of 6, between tokens that may go", 1),
    "unbind": (lambda x: x.unbind(1)[0], "takes the sequence apart token by token", 0),
    "index of tokens": (lambda x: x[:, [0, 2]], "indexes a dimension that runs over the token axis", 0),
    "two indices": (lambda x: x[:, [0, 1], [0, 1]], "indexes with several or computed index tensors", 0),
    "gather of tokens": (
        lambda x: x.gather(1, torch.zeros(x.shape[0], 6, 8, dtype=torch.long)),
        "picks entries of a dimension that runs over the token axis",
        0,
    ),
    "gather of samples": (
        lambda x: x.gather(0, x.long() * 0),
        "picks entries of a dimension that runs over the samples of the batch",
        0,
    ),
    "gather for some tokens": (
        lambda x: x.gather(2, torch.zeros(x.shape[0], 4, 2, dtype=torch.long)),
        "picks for some of the tokens or samples only",
        0,
    ),
    "gather for one sample": (
        lambda x: x.gather(2, torch.zeros(1, 6, 2, dtype=torch.long)),
        "picks for some of the tokens or samples only",
        0,
    ),
    "scatter over tokens": (
        lambda x: torch.zeros_like(x).scatter(1, x.long() * 0, 1.0),
        "writes entries of a dimension that runs over the token axis",
        0,
    ),
    "scatter for some tokens": (
        lambda x: x.scatter(2, torch.zeros(x.shape[0], 4, 2, dtype=torch.long), 1.0),
        "writes for some of the tokens or samples only",
        0,
    ),
    "scatter from a longer source": (
        lambda x: x[:, 1:].scatter(2, torch.zeros(x.shape[0], 5, 2, dtype=torch.long), x),
        "two different sequences of tokens meet",
        1,
    ),
    "weights picked at will": (
        lambda x: ((x.unsqueeze(-1) * 2).softmax(1).gather(2, x[..., None].long() * 0) * x[..., None]).sum(1),
        COUNTS,
        0,
    ),
    "pad of tokens": (lambda x: F.pad(x, (0, 0, 1, 0)), "pads a dimension that runs over the token axis", 0),
    "flip": (lambda x: x.flip(1), "changes the order of the tokens", 0),
    "roll": (lambda x: x.roll(1, 1), "changes the order of the tokens", 0),
    "roll of all": (lambda x: x.roll(1), "changes the order of the tokens", 0),
    "repeat": (lambda x: x.repeat(1, 2, 1), "repeats the sequence of tokens", 0),
    "samples reversed": (lambda x: x.flip(0), "changes the order of the samples", 0),
    "samples shifted": (lambda x: x.roll(1, 0), "changes the order of the samples", 0),
    "samples repeated": (lambda x: x.repeat(2, 1, 1), "repeats the samples of the batch", 0),
    "samples joined": (lambda x: torch.cat([x, x], 0), "joins the samples of the batch", 0),
    "each sample with each": (
        lambda x: x[:, None] * x,
        "lets the samples of the batch meet, and each keeps tokens of its own",
        0,
    ),
    "grid of some": (
        lambda x: x.reshape(-1, 2, 3, 8),
        "reshapes [batch, tokens(6), 8] to [B, 2, 3, 8], which splits the token axis",
        1,
    ),
    "windows": (
        lambda x: grid(x).transpose(1, 2).reshape(-1, 2, 3, 8),
        "reshapes [batch, columns(3), rows(2), 8] to [B, 2, 3, 8], which splits the token axis",
        0,
    ),
    "shifted columns": (lambda x: grid(x).roll(1, 2), "changes the order of the tokens", 0),
    "padded rows": (lambda x: F.pad(grid(x), (0, 0, 0, 0, 0, 1)), "pads a dimension that runs over the token axis", 0),
    "one row": (lambda x: grid(x)[:, 0], f"picks from {ALONE}", 0),
    "some rows": (lambda x: grid(x)[:, :1], f"picks from {ALONE}", 0),
    "rows joined": (lambda x: torch.cat([grid(x), grid(x)], 1), f"picks from {ALONE}", 0),
    "softmax over columns": (lambda x: grid(x).softmax(2), f"a softmax over {ALONE}", 0),
    "mean over rows": (lambda x: grid(x).mean(1), "takes rows or columns of the tokens' grid by themselves", 0),
    "maximum over columns": (lambda x: grid(x).amax(2), "takes rows or columns of the tokens' grid by themselves", 0),
    "attention in rows": (lambda x: F.scaled_dot_product_attention(*[grid(x)] * 3), f"attends to {ALONE}", 0),
    "products in rows": (
        lambda x: grid(x) @ grid(x).mT,
        "takes rows or columns of the tokens' grid by themselves",
        0,
    ),
    "a sum over columns": (
        lambda x: torch.einsum("bhwc,bhwd->bhcd", grid(x), grid(x)),
        "sums over tokens with weights that no softmax over tokens has normalised",
        0,
    ),
    "a table of rows, and two sequences": (
        lambda x: torch.einsum("bhwc,bmc,hkc->bhwmk", x[:, 2:].reshape(-1, 2, 2, 8), x, torch.ones(2, 5, 8)),
        "an input has an entry per row or column of the tokens' grid, and those left form none",
        2,
    ),
    "a table of rows that sum to one": (
        lambda x: torch.einsum("bhwc,hkc->bhwk", grid(x), torch.ones(2, 5, 8).softmax(0)),
        "multiplies with weights that were normalised over tokens, and cannot be again",
        0,
    ),
    "a sum over a table for each token": (
        lambda x: (x @ x.mT).softmax(-1).transpose(0, 1) @ torch.ones(6, 6, 5),
        "an input with an entry per token has no dimension for samples to be gathered along",
        0,
    ),
    "columns as rows": (
        lambda x: F.scaled_dot_product_attention(*[grid(x).transpose(1, 2).reshape(-1, 6, 8)] * 3),
        f"attends to {ALONE}",
        0,
    ),
    "a grid turned": (
        lambda x: grid(x) + grid(x).reshape(-1, 3, 2, 8).transpose(1, 2),
        "two different sequences of tokens meet",
        0,
    ),
    "a table over folded rows": (
        lambda x: x.reshape(-1, 3, 8) + torch.ones(3, 8),
        "an input with an entry per token meets a grid that is folded with another dimension",
        0,
    ),
    "cat: a stretch as long as another batch": (
        lambda x: torch.cat([x, x.new_ones(x.shape[0], x.shape[0] + 1, 8)], 1),
        "joins tokens with a stretch of unknown length",
        0,
    ),
    "conv2d": (
        lambda x: F.conv2d(x[:, None], torch.ones(1, 1, 3, 3), padding=1),
        "a convolution, which needs the tokens on their full grid",
        0,
    ),
}


@pytest.mark.parametrize(("op", "reason", "prefix"), REFUSES.values(), ids=REFUSES)
def test_refuses(op: Op, reason: str, prefix: int) -> None:
    gm = graph_of(op)
    try:
        axis = axis_from_input(gm, prefix)
    except Refusal as refusal:  # it met the axis again
        assert refusal.reason == f"{reason}, and later layers depend on it"
        return
    assert refusals(axis) == [reason]
    assert not [n for n in leaves(gm) if n in axis.layouts]
