"""One handle, or two handles of one model, called from several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import oracle
import torch
from generated import Config, GeneratedViT
from oracle import Pruning
from torch import Tensor, nn

import rs_compile

TOLERANCE = 2e-4
CAPTURE = "capturing the model"
PRUNING = Pruning({0: 0.7, 1: 0.8})


class AnySize(nn.Module):
    """Images of any size with the generated model's blocks; a mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = GeneratedViT(Config(prefix=0, output="mean"))

    def forward(self, images: Tensor) -> Tensor:
        x = self.inner.patch_embed(images).flatten(2).transpose(1, 2)
        for block in self.inner.blocks:
            x = block(x)
        out: Tensor = self.inner.norm(x).mean(1)
        return out

    def pruned(self, images: Tensor) -> dict[str, Tensor]:
        """By hand."""
        stream = oracle.run_blocks(
            self.inner.patch_embed(images).flatten(2).transpose(1, 2),
            self.inner.blocks,
            lambda block, x: block.attn(block.norm1(x)),
            lambda block, x: block.mlp(block.norm2(x)),
            PRUNING,
        )
        return {"output": self.inner.norm(stream.tokens).mean(1)}


def images(h: int, w: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, h, w, generator=torch.Generator().manual_seed(h * w))


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """Runs them at once, and returns their results, or raises what one of them raised."""
    results: list[Any] = [None] * len(works)
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(i: int) -> None:
        try:
            start.wait()
            with torch.no_grad():  # a thread has its own
                results[i] = works[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    if errors:
        raise errors[0]
    assert not any(t.is_alive() for t in threads)
    return results


@torch.no_grad()
def test_serving_while_other_sizes_are_captured() -> None:
    """torch.export swaps the model's parameters while it runs, and nobody who is served may notice."""
    model = AnySize().eval()
    first, *others = [(6, 8), (8, 8), (6, 12)]
    said: list[str] = []
    fast = rs_compile.optimize(model, PRUNING.keep, backend="eager", progress=said.append)
    wanted = model.pruned(images(*first))
    fast(images(*first))
    done = threading.Event()
    gaps = []

    def serve() -> None:
        while not done.is_set():
            gaps.append(oracle.max_difference(fast(images(*first)), wanted["output"]))

    def capture() -> list[Tensor]:
        try:
            return [fast(images(*size)) for size in others]
        finally:
            done.set()

    _, got = in_threads(serve, capture)
    assert max(gaps) <= TOLERANCE, f"{sum(g > TOLERANCE for g in gaps)} of {len(gaps)} served results are wrong"
    for result, size in zip(got, others, strict=True):
        oracle.assert_close(result, model.pruned(images(*size)), TOLERANCE, str(size))
    assert said.count(CAPTURE) == 3, "each size once, though the model's state was read during captures"


@torch.no_grad()
def test_a_raced_first_call_in_different_sizes() -> None:
    model = AnySize().eval()
    sizes = [(6, 8), (8, 8), (6, 8), (8, 8)]
    said: list[str] = []
    fast = rs_compile.optimize(model, PRUNING.keep, backend="eager", progress=said.append)
    got = in_threads(*(partial(fast, images(*s)) for s in sizes))
    for result, size in zip(got, sizes, strict=True):
        oracle.assert_close(result, model.pruned(images(*size)), TOLERANCE, str(size))
    assert said.count(CAPTURE) == 2


@torch.no_grad()
def test_two_handles_of_one_model() -> None:
    """They share its parameters, which a capture swaps for both."""
    inner = GeneratedViT(Config())
    x = inner.images(2)
    keeps = ({0: 0.7}, {1: 0.5})
    handles = [rs_compile.optimize(inner, keep, backend="eager") for keep in keeps]
    got = in_threads(*(partial(h, x) for h in handles))
    for result, keep in zip(got, keeps, strict=True):
        oracle.assert_close(result, inner.forward_pruned(x, Pruning(keep)).outputs, TOLERANCE, str(keep))
    assert [len(h._plans) for h in handles] == [1, 1]
