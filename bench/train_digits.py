"""Trains the digits ViT: `python -m bench.train_digits --out bench/data/digits_vit.safetensors`.

Plain supervised training, no token pruned or dropped, so that what the compiler prunes is an ordinary model.
Hyper-parameters are chosen by `--validate`; the test images are looked at once, after the last epoch.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from bench.digits import PATCH, SIDE, digits_vit, load_digits

WARMUP = 0.08  # share of the steps
ROTATION = math.radians(12)
SCALE = 0.1
SHEAR = 0.1
SHIFT = 0.1  # of half a side: 2 pixels
HOLD_OUT_SEED = 0
HOLD_OUT_SHARE = 5


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [n, 1, 40, 40], each turned, scaled, sheared and shifted a little; the same shape."""
    amounts = torch.tensor([ROTATION, SCALE, SHEAR, SHIFT, SHIFT]).unsqueeze(1)
    drawn = (torch.rand(len(amounts), len(images), generator=generator) * 2 - 1) * amounts
    angle, log_scale, shear, across, down = drawn.unbind(0)
    zoom = torch.exp(log_scale)
    top = torch.stack([zoom * angle.cos(), zoom * (shear - angle.sin()), across], 1)
    bottom = torch.stack([zoom * angle.sin(), zoom * angle.cos(), down], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def hold_out(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the train split to train on, and a fifth of each class to choose hyper-parameters by."""
    generator = torch.Generator().manual_seed(HOLD_OUT_SEED)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        held[members[: len(members) // HOLD_OUT_SHARE]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = max(1, int(WARMUP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def new_model() -> nn.Module:
    """An untrained model with 2-D sines as positions, and Xavier weights (timm's 0.02 is meant for wider
    layers): both learn much sooner from so few images."""
    model = digits_vit()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    pos_embed = model.get_parameter("pos_embed")
    side = SIDE // PATCH
    with torch.no_grad():
        pos_embed[0, 1:] = 0.2 * build_sincos2d_pos_embed([side, side], dim=pos_embed.shape[-1])
    return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices only: not for biases, norms, positions, the class token and Mamba's log A."""
    spared = ("pos_embed", "cls_token", "_log")
    decay = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith(spared)]
    kept = {id(p) for p in decay}
    rest = [p for p in model.parameters() if id(p) not in kept]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def train(
    build: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    epochs: int,
    batch: int,
    peak: float,
    weight_decay: float,
    seed: int,
) -> nn.Module:
    """Returns the model that `build` makes after the last epoch on images [n, 1, 40, 40] and labels [n], in eval
    mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build().train()
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=peak)
    steps = epochs * (len(images) // batch)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  train accuracy {task.fields[accuracy]:.1%}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("epoch 0", total=steps, loss=math.nan, accuracy=math.nan)
        step = 0
        for epoch in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            losses, right = [], 0
            for rows in order[: len(order) // batch * batch].split(batch):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, peak)
                logits = model(augment(images[rows], generator))
                loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                losses.append(loss.item())
                right += int((logits.argmax(1) == labels[rows]).sum())
                step += 1
                progress.advance(task)
            progress.update(
                task,
                description=f"epoch {epoch + 1}/{epochs}",
                loss=sum(losses) / len(losses),
                accuracy=right / (len(losses) * batch),
            )
            if not progress.console.is_terminal and (epoch + 1) % 5 == 0:
                shown = progress.tasks[task].fields
                print(f"epoch {epoch + 1}: loss {shown['loss']:.3f}, {shown['accuracy']:.1%}", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images [n, 1, 40, 40] that the model names rightly."""
    return float((model(images).argmax(1) == labels).double().mean())


def main(build: Callable[[], nn.Module] = new_model, epochs: int = 60) -> None:
    """The command line, for the model that `build` makes."""
    parser = argparse.ArgumentParser(description="Trains a small model on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; part of what makes runs repeat")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="where the .safetensors file goes")
    target.add_argument(
        "--validate", action="store_true", help="train on 4/5 of the train split, score the rest, save none"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images, labels = load_digits("train")
    rows, held = hold_out(labels) if args.validate else (torch.arange(len(labels)), None)
    started = time.perf_counter()
    model = train(build, images[rows], labels[rows], args.epochs, args.batch, args.lr, args.weight_decay, args.seed)
    seconds = time.perf_counter() - started
    if held is not None:
        print(f"validation accuracy {accuracy(model, images[held], labels[held]):.2%}; {seconds:.0f} s")
        return
    recipe = {k: v for k, v in vars(args).items() if k not in ("out", "validate")}
    safetensors.torch.save_file(model.state_dict(), args.out, metadata={"recipe": json.dumps(recipe)})
    args.out.chmod(0o644)  # safetensors writes files that only their owner can read
    test = accuracy(model, *load_digits("test"))
    print(f"test accuracy {test:.2%}; {seconds:.0f} s of training; {args.out}")


if __name__ == "__main__":
    main()
