"""The oracle: pruning by representation shift done by hand, in eager PyTorch, on the model's own modules.

It shares no code with the compiler and selects tokens in a Python loop, sample by sample, so that it is
easy to believe. Shapes: B samples, n current tokens (of N at first), C channels, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

Operation = Literal["mlp", "attention", "block"]
Metric = Literal["l2", "l1", "cosine"]
Branch = Callable[[Any, Tensor], Tensor]  # (layer, stream [B, n, C]) -> what it adds


@dataclass(frozen=True)
class Pruning:
    """What to prune. `keep` maps a 0-based block to its keep ratio; the first `protected` tokens stay."""

    keep: Mapping[int, float]
    operation: Operation = "mlp"
    metric: Metric = "l2"
    with_skip: bool = False
    protected: int = 0
    lowest: bool = False


def keep_count(tokens: int, keep_ratio: float) -> int:
    """n - int(rate * n) with rate = 1 - keep_ratio as the decimal that was written."""
    return tokens - int((1 - Fraction(str(keep_ratio))) * tokens)


def distance(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """D(a, b) over channels: [B, n, C] x [B, n, C] -> [B, n]; half precision is scored in float32."""
    if a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    if metric == "l2":
        return ((a - b) ** 2).sum(-1).sqrt()
    if metric == "l1":
        return (a - b).abs().sum(-1)
    if metric == "cosine":
        return 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    raise ValueError(metric)


def prune(x: Tensor, score: Tensor, keep_count: int, protected: int) -> tuple[Tensor, Tensor]:
    """Keeps the first `protected` tokens and the highest scores of the others, in the original order.

    Ties go to the earlier token. x [B, n, C], score [B, n] -> kept tokens [B, K, C], their indices [B, K].
    """
    chosen = []
    for sample in score.detach().tolist():
        order = [-value for value in sample]
        rest = sorted(range(protected, len(sample)), key=order.__getitem__)  # a stable sort
        chosen.append(list(range(protected)) + sorted(rest[: keep_count - protected]))
    index = torch.tensor(chosen, device=x.device)
    return torch.stack([x[b, kept] for b, kept in enumerate(index)]), index


@dataclass
class Stream:
    """The residual stream while tokens leave it, and what every pruned token was worth when it left."""

    tokens: Tensor
    index: Tensor = field(init=False)  # [B, n]: original positions
    last_seen: Tensor = field(init=False)  # [B, N, C]
    margin: float = float("inf")  # smallest relative gap between the last kept and the first removed score

    def __post_init__(self) -> None:
        batch, n, _ = self.tokens.shape
        self.index = torch.arange(n, device=self.tokens.device).repeat(batch, 1)
        self.last_seen = self.tokens

    def prune(self, score: Tensor, keep_ratio: float, protected: int, lowest: bool = False) -> None:
        count = keep_count(self.tokens.shape[1], keep_ratio)
        if count == self.tokens.shape[1]:
            return
        score = -score if lowest else score
        ranked = score.detach()[:, protected:].sort(dim=1, descending=True).values
        edge = count - protected
        if edge > 0:
            gap = (ranked[:, edge - 1] - ranked[:, edge]) / ranked.abs().amax(dim=1).clamp_min(1e-30)
            self.margin = min(self.margin, gap.min().item())
        self.last_seen = self.restored()
        self.tokens, kept = prune(self.tokens, score, count, protected)
        self.index = self.index.gather(1, kept)

    def restored(self) -> Tensor:
        """[B, N, C]: the kept tokens as they are, the pruned ones as they were when they left."""
        where = self.index.unsqueeze(-1).expand_as(self.tokens)
        return self.last_seen.scatter(1, where, self.tokens)


def score_of(
    pruning: Pruning,
    start: Tensor,
    attention: Tensor,
    middle: Tensor,
    mlp: Tensor,
    end: Tensor,
) -> Tensor:
    """The representation shift [B, n] of a block from the values on its way, each [B, n, C].

    Args:
        start: the stream at the block's entry.
        attention: what the attention branch adds to `start`.
        middle: the stream that the MLP branch is added to.
        mlp: what the MLP branch adds to `middle`.
        end: the stream at the block's end.
    """
    if pruning.operation == "block":
        return distance(end, start, pruning.metric)
    branch, stream = (mlp, middle) if pruning.operation == "mlp" else (attention, start)
    return distance(stream + branch if pruning.with_skip else branch, stream, pruning.metric)


def run_blocks(
    x: Tensor, layers: Iterable[Any], attention_branch: Branch, mlp_branch: Branch, pruning: Pruning
) -> Stream:
    """Runs pre-norm blocks by their two branches and prunes after the scheduled ones."""
    stream = Stream(x)
    for i, layer in enumerate(layers):
        start = stream.tokens
        attention = attention_branch(layer, start)
        middle = start + attention
        mlp = mlp_branch(layer, middle)
        stream.tokens = middle + mlp
        if i in pruning.keep:
            score = score_of(pruning, start, attention, middle, mlp, stream.tokens)
            stream.prune(score, pruning.keep[i], pruning.protected, pruning.lowest)
    return stream


@dataclass
class Result:
    """What the pruned model should return, by name, which tokens [B, K] it kept, and how clearly."""

    outputs: dict[str, Tensor]
    kept: Tensor
    margin: float


def result(stream: Stream, **outputs: Tensor) -> Result:
    return Result(outputs, stream.index, stream.margin)


def timm_vit(model: Any, images: Tensor, pruning: Pruning) -> Result:
    """timm's VisionTransformer family; with `global_pool=""` and no classes its output is all tokens."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    stream = run_blocks(
        x,
        model.blocks,
        lambda block, x: block.ls1(block.attn(block.norm1(x))),
        lambda block, x: block.ls2(block.mlp(block.norm2(x))),
        pruning,
    )
    all_tokens = model.global_pool == "" and model.attn_pool is None
    end = stream.restored() if all_tokens else stream.tokens
    return result(stream, output=model.forward_head(model.norm(end)))


def hf_vit(model: Any, images: Tensor, pruning: Pruning) -> Result:
    """transformers' ViTModel with its pooler."""
    stream = run_blocks(
        model.embeddings(images),
        model.layers,
        lambda layer, x: layer.dropout(layer.attention(layer.layernorm_before(x))[0]),
        lambda layer, x: layer.dropout(layer.mlp(layer.layernorm_after(x))),
        pruning,
    )
    return result(
        stream,
        last_hidden_state=model.layernorm(stream.restored()),
        pooler_output=model.pooler(model.layernorm(stream.tokens)),
    )


def _dinov2_stream(model: Any, images: Tensor, pruning: Pruning) -> Stream:
    return run_blocks(
        model.embeddings(images),
        model.encoder.layer,
        lambda layer, x: layer.layer_scale1(layer.attention(layer.norm1(x))[0]),
        lambda layer, x: layer.layer_scale2(layer.mlp(layer.norm2(x))),
        pruning,
    )


def hf_dinov2(model: Any, images: Tensor, pruning: Pruning) -> Result:
    """transformers' Dinov2Model."""
    stream = _dinov2_stream(model, images, pruning)
    return result(
        stream,
        last_hidden_state=model.layernorm(stream.restored()),
        pooler_output=model.layernorm(stream.tokens)[:, 0],
    )


def hf_dinov2_classifier(model: Any, images: Tensor, pruning: Pruning) -> Result:
    """transformers' Dinov2ForImageClassification: class token and the mean of the patches that are left."""
    stream = _dinov2_stream(model.dinov2, images, pruning)
    tokens = model.dinov2.layernorm(stream.tokens)
    return result(stream, logits=model.classifier(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)))


def hf_clip(model: Any, images: Tensor, pruning: Pruning) -> Result:
    """transformers' CLIPVisionModel: its tokens leave without a final norm."""
    stream = run_blocks(
        model.pre_layrnorm(model.embeddings(images)),
        model.encoder.layers,
        lambda layer, x: layer.self_attn(layer.layer_norm1(x), attention_mask=None)[0],
        lambda layer, x: layer.mlp(layer.layer_norm2(x)),
        pruning,
    )
    return result(
        stream,
        last_hidden_state=stream.restored(),
        pooler_output=model.post_layernorm(stream.tokens[:, 0]),
    )


def _videomae_stream(model: Any, videos: Tensor, pruning: Pruning) -> Stream:
    return run_blocks(
        model.embeddings(videos, None),
        model.encoder.layer,
        lambda layer, x: layer.attention(layer.layernorm_before(x)),
        lambda layer, x: layer.output.dense(layer.intermediate(layer.layernorm_after(x))),
        pruning,
    )


def hf_videomae(model: Any, videos: Tensor, pruning: Pruning) -> Result:
    """transformers' VideoMAEModel, with its final norm or, for mean pooling heads, without."""
    stream = _videomae_stream(model, videos, pruning)
    end = stream.restored()
    return result(stream, last_hidden_state=end if model.layernorm is None else model.layernorm(end))


def hf_videomae_classifier(model: Any, videos: Tensor, pruning: Pruning) -> Result:
    """transformers' VideoMAEForVideoClassification with mean pooling: the mean reads the short sequence."""
    stream = _videomae_stream(model.videomae, videos, pruning)
    return result(stream, logits=model.classifier(model.fc_norm(stream.tokens.mean(1))))


def torchvision_vit(model: Any, images: Tensor, pruning: Pruning) -> Result:
    """torchvision's VisionTransformer (nn.MultiheadAttention)."""

    def attention(block: Any, x: Tensor) -> Tensor:
        y = block.ln_1(x)
        return block.dropout(block.self_attention(y, y, y, need_weights=False)[0])

    x = model._process_input(images)
    x = torch.cat([model.class_token.expand(x.shape[0], -1, -1), x], dim=1)
    stream = run_blocks(
        model.encoder.dropout(x + model.encoder.pos_embedding),
        model.encoder.layers,
        attention,
        lambda block, x: block.mlp(block.ln_2(x)),
        pruning,
    )
    return result(stream, output=model.heads(model.encoder.ln(stream.tokens)[:, 0]))


@torch.no_grad()
def shake(model: nn.Module, by: float) -> None:
    """Adds noise of that deviation to every parameter, so that none is 0 or 1."""
    for parameter in model.parameters():
        parameter.add_(by * torch.randn_like(parameter))


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter a random value so large that tokens differ, and no branch is near zero.

    A fresh model's scores are nearly equal, and LayerScale at 1e-5 hides every branch: an oracle test on
    it could not fail.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last in ("gamma", "lambda1"):  # LayerScale
            parameter.copy_(0.7 + 0.2 * noise(parameter))
        elif parameter.ndim == 1:
            parameter.copy_((1.0 if last == "weight" else 0.0) + 0.3 * noise(parameter))
        elif last in ("weight", "in_proj_weight", "q_proj_weight") and "embedding" not in name:
            parameter.copy_(1.5 * noise(parameter) * parameter[0].numel() ** -0.5)
        else:  # tokens and position embeddings
            parameter.copy_(noise(parameter))
    return model


def named_outputs(value: Any) -> dict[str, Tensor]:
    """A model's return value by field name: a tensor, a tuple, a dict or a ModelOutput (which is a dict)."""
    if isinstance(value, Tensor):
        return {"output": value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {str(name): tensor for name, tensor in pairs if isinstance(tensor, Tensor)}


def max_difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; NaN where only one side is NaN counts as infinite."""
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    both = a.isnan() & b.isnan()
    gap = (a - b).abs().masked_fill(both | (a == b), 0.0)
    return gap.nan_to_num(nan=float("inf")).max().item() if gap.numel() else 0.0


def assert_close(actual: Any, expected: Any, atol: float, what: str = "") -> None:
    """Compares all fields of two return values, and says which differs by how much."""
    got, wanted = named_outputs(actual), named_outputs(expected)
    assert got.keys() == wanted.keys(), f"{what}: fields {sorted(got)} instead of {sorted(wanted)}"
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype, f"{what} {name}: dtype {got[name].dtype}"
        gap = max_difference(got[name], wanted[name])
        assert gap <= atol, f"{what} {name}: max abs difference {gap:.3e}, tolerance {atol:.0e}"
