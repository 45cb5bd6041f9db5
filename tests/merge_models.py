"""Models taken apart for the oracle of merging (`merge_oracle`), in eager PyTorch on their own modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from generated import GeneratedViT, distance_mask, reach_mask, rotary_tables, rotate
from merge_oracle import QKV, Merging, Parts, Stream, attend
from torch import Tensor


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def timm_vit(model: Any) -> Parts:
    """timm's VisionTransformer family, with every way of pooling that the zoo has."""

    def qkv(block: Any, x: Tensor, index: Tensor) -> QKV:
        attn = block.attn
        q, k, v = (heads(part, attn.num_heads) for part in attn.qkv(block.norm1(x)).chunk(3, -1))
        return attn.q_norm(q), attn.k_norm(k), v, None

    def outputs(stream: Stream, how: Merging) -> dict[str, Tensor]:
        x = model.norm(stream.tokens)
        if model.attn_pool is not None:
            pool = model.attn_pool
            q = heads(pool.q(pool.latent.expand(len(x), -1, -1)), pool.num_heads)
            k, v = (heads(part, pool.num_heads) for part in pool.kv(x).chunk(2, -1))
            y, _ = attend(pool.q_norm(q), pool.k_norm(k), v, None, stream.sizes if how.size_bias else None)
            y = pool.proj(y)
            return {"output": model.head(model.fc_norm((y + pool.mlp(pool.norm(y)))[:, 0]))}
        if model.global_pool == "avg":
            return {"output": model.head(model.fc_norm(stream.mean(x, how, model.num_prefix_tokens)))}
        return {"output": model.forward_head(model.norm(stream.whole) if model.global_pool == "" else x)}

    return Parts(
        lambda images: model.norm_pre(model._pos_embed(model.patch_embed(images))),
        model.blocks,
        qkv,
        lambda block, y: block.ls1(block.attn.proj(y)),
        lambda block, x: block.ls2(block.mlp(block.norm2(x))),
        outputs,
    )


def hf_vit(model: Any) -> Parts:
    """transformers' ViTModel with its pooler."""

    def qkv(layer: Any, x: Tensor, index: Tensor) -> QKV:
        x, attn = layer.layernorm_before(x), layer.attention
        q, k, v = (heads(p(x), attn.num_attention_heads) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        return q, k, v, None

    return Parts(
        model.embeddings,
        model.layers,
        qkv,
        lambda layer, y: layer.attention.o_proj(y),
        lambda layer, x: layer.mlp(layer.layernorm_after(x)),
        lambda stream, how: {
            "last_hidden_state": model.layernorm(stream.whole),
            "pooler_output": model.pooler(model.layernorm(stream.tokens)),
        },
    )


def hf_videomae_classifier(model: Any) -> Parts:
    """transformers' VideoMAEForVideoClassification with mean pooling."""

    def qkv(layer: Any, x: Tensor, index: Tensor) -> QKV:
        x, attn = layer.layernorm_before(x), layer.attention.attention
        q, k, v = (heads(p(x), attn.num_attention_heads) for p in (attn.query, attn.key, attn.value))
        return q, k, v, None

    return Parts(
        lambda videos: model.videomae.embeddings(videos, None),
        model.videomae.encoder.layer,
        qkv,
        lambda layer, y: layer.attention.output.dense(y),
        lambda layer, x: layer.output.dense(layer.intermediate(layer.layernorm_after(x))),
        lambda stream, how: {"logits": model.classifier(model.fc_norm(stream.mean(stream.tokens, how)))},
    )


def generated(model: GeneratedViT) -> Parts:
    """Generated models: masks, position bias and RoPE belong to the original position of the token left."""
    config = model.config

    def qkv(block: Any, x: Tensor, index: Tensor) -> QKV:
        attn = block.attn
        q, k, v = attn.project(x if config.norm == "post" else block.norm1(x))
        if config.rope:
            p, d = config.prefix, attn.head_dim
            cos, sin = rotary_tables(config.patches, d)
            cos, sin = torch.cat([torch.ones(p, d), cos]), torch.cat([torch.zeros(p, d), sin])
            q, k = (rotate(t, cos[index][:, None], sin[index][:, None]) for t in (q, k))
        added = torch.zeros(len(x), 1, x.shape[1], x.shape[1])
        rows, columns = index[:, :, None], index[:, None, :]
        if config.mask == "boolean":
            added = added.masked_fill(~reach_mask(config.tokens)[rows, columns][:, None], -math.inf)
        elif config.mask != "none":
            added = added + distance_mask(config.tokens)[rows, columns][:, None]
        if config.position_bias:
            added = added + attn.bias[:, rows, columns].transpose(0, 1)
        return q, k, v, added

    def outputs(stream: Stream, how: Merging) -> dict[str, Tensor]:
        if config.output == "tokens":
            return {"output": model.head(model.norm(stream.whole))}
        x = model.norm(stream.tokens)
        if config.output == "class":
            return {"output": model.head(x[:, 0])}
        return {"output": model.head(stream.mean(x, how, config.prefix if config.output == "patch-mean" else 0))}

    post, parallel = config.norm == "post", config.parallel != "none"
    return Parts(
        model.embed,
        model.typed_blocks(),
        qkv,
        lambda block, y: block.scaled(block.attn.proj(y), 1),
        lambda block, x: block.scaled(block.mlp(x if post else (block.norm1 if parallel else block.norm2)(x)), 2),
        outputs,
        middle_norm=(lambda block, x: block.norm1(x)) if post else (lambda block, x: x),
        end_norm=(lambda block, x: block.norm2(x)) if post else (lambda block, x: x),
        parallel=parallel,
    )


ZOO: dict[str, Callable[[Any], Parts]] = {
    **dict.fromkeys(
        ("deit_tiny", "deit_tiny_distilled", "dinov2_reg4", "siglip", "vit_average", "vit_all_tokens"), timm_vit
    ),
    "hf_vit": hf_vit,
    "hf_vit_eager": hf_vit,
    "hf_videomae_classifier": hf_videomae_classifier,
}
