"""How important a token is: representation shift (Eq. 4 of the paper), and the baselines it is compared with."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Metric = Literal["l2", "l1", "cosine"]
Operation = Literal["mlp", "attention", "block"]
Importance = Literal["shift", "class-attention", "mean-attention", "attention-entropy", "top-vim", "random"]


def shift(after: Tensor, before: Tensor, metric: Metric = "l2", protected: Tensor | None = None) -> Tensor:
    """Representation shift D(F(x), x), Eq. 4.

    Args:
        after: F(x), [B, N, C].
        before: x, [B, N, C].
        metric: D, "l2" (unsquared), "l1" or "cosine" (1 - cos).
        protected: [N] or [B, N] bool. Such a token scores NaN, any other infinity if its score is not finite, all of
            it before the sum over C, because Inductor would move what comes after it into the kernel that selects.

    Returns:
        [B, N] in float32, at least 0.
    """
    after, before = after.float(), before.float()
    if metric == "cosine":
        found = 1 - torch.nn.functional.cosine_similarity(after, before, dim=-1)
        return found if protected is None else _set_apart(found, protected)
    apart = after - before
    if protected is not None:
        apart = _set_apart(apart, protected.unsqueeze(-1))
    norms: Tensor = torch.linalg.vector_norm(apart, ord=2 if metric == "l2" else 1, dim=-1)
    return norms


def _set_apart(x: Tensor, protected: Tensor) -> Tensor:
    return torch.where(protected, torch.nan, torch.where(x.isnan(), torch.inf, x))


def class_attention(attention: Tensor) -> Tensor:
    """Attention of the first token to every token, averaged over heads, Eq. 2: [B, N] from a map [B, H, N, N]."""
    return attention[:, :, 0].float().mean(1)


def mean_attention(attention: Tensor) -> Tensor:
    """Attention that each token receives, averaged over heads and queries, Eq. 3: [B, N] from a map [B, H, N, N]."""
    return attention.float().mean((1, 2))


def attention_entropy(attention: Tensor) -> Tensor:
    """Negative entropy of each token's attention, heads averaged first (vid-TLDR): [B, N] from a map [B, H, N, N]."""
    attention = attention.float().mean(1)
    return torch.xlogy(attention, attention).sum(-1)  # xlogy: attention underflows to 0


def mean_activation(gated: Tensor) -> Tensor:
    """ToP-ViM's score, the mean over channels of max(0, y): [B, N] from a mixer's gated output y [B, N, D]."""
    return gated.float().clamp_min(0).mean(-1)


def flipped_activation(gated: Tensor) -> Tensor:
    """ToP-ViM's score as its code runs, [B, N] from the backward direction's gated output y [B, N, D]: each token has
    the sum over the channels of its mirror image, as the code does not turn the order back."""
    return gated.float().sum(-1).flip(1)


def random_score(like: Tensor) -> Tensor:
    """A random number a token: [B, N] from [B, N, C]."""
    return torch.rand(like.shape[:2], device=like.device)
