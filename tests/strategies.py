"""Hypothesis strategies: configs of generated transformers, and schedules that fit them."""

from __future__ import annotations

import generated
import oracle
from hypothesis import strategies as st


@st.composite
def configs(draw: st.DrawFn) -> generated.Config:
    """Valid configs: N from 5 to 30, width 8 to 32; collisions of N with C happen and are welcome."""
    heads = draw(st.sampled_from((1, 2, 4)))
    head_dim = draw(st.sampled_from((8, 16) if heads < 4 else (8,)))
    grid = draw(st.tuples(st.integers(2, 5), st.integers(3, 5)))
    prefix = draw(st.integers(0, 5))
    output = draw(st.sampled_from(generated.OUTPUTS if prefix else generated.OUTPUTS[1:]))
    parallel = draw(st.sampled_from(("none", "none", "none", "left", "inner")))
    return generated.Config(
        depth=draw(st.integers(1, 3)),
        width=heads * head_dim,
        heads=heads,
        grid=grid,
        prefix=prefix,
        output=output,
        norm="pre" if parallel != "none" else draw(st.sampled_from(("pre", "pre", "post"))),
        layer_scale=draw(st.booleans()),
        mlp=draw(st.sampled_from(("gelu", "swiglu"))),
        fused_qkv=draw(st.booleans()),
        attention=draw(st.sampled_from(generated.ATTENTIONS)),
        mask=draw(st.sampled_from(("none", "none", "buffer", "computed", "boolean"))),
        position_bias=draw(st.booleans()),
        rope=draw(st.booleans()),
        parallel=parallel,
        autocast_off=draw(st.booleans()),
        tables_no_grad=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def prunings(draw: st.DrawFn, config: generated.Config) -> oracle.Pruning:
    """Schedules for `config` that prune something and leave at least one patch."""
    # a class token or restored tokens do not see what is pruned after the last block, so prune before it too
    blind = config.output in ("class", "tokens") and config.depth > 1
    blocks = {draw(st.integers(0, config.depth - 2 if blind else config.depth - 1))}
    blocks |= draw(st.sets(st.integers(0, config.depth - 1)))
    keep: dict[int, float] = {}
    tokens = config.tokens
    for block in sorted(blocks):
        ratio = draw(st.sampled_from((0.3, 0.5, 0.6, 0.75, 0.8, 0.9)))
        if oracle.keep_count(tokens, ratio) > config.prefix:
            keep[block] = ratio
            tokens = oracle.keep_count(tokens, ratio)
    if tokens == config.tokens:  # too few patches for what was drawn; one of 5 tokens can always go
        keep = {min(blocks): 0.8}
    operation: oracle.Operation = draw(st.sampled_from(("mlp", "mlp", "attention", "block")))
    return oracle.Pruning(
        keep=keep,
        operation=operation,
        metric=draw(st.sampled_from(("l2", "l2", "l1", "cosine"))),
        with_skip=operation != "block" and draw(st.booleans()),
        protected=config.prefix,
    )
