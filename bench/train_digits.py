"""Trains the demo model: `python -m bench.train_digits --epochs 45 --seed 0 --out digits_vit.safetensors`.

Plain supervised training, no token pruned or dropped, so that what the compiler prunes is an ordinary model.
The test images are looked at once, after the last epoch.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import safetensors.torch
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from rs_compile.digits import CANVAS, PATCH, PLACES, digits_vit, enlarge, load_digits, load_scans, place

WARMUP = 0.08  # share of the steps
ROTATION = math.radians(12)
SCALE = 0.1
SHEAR = 0.1


def augment(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Enlarged digits [n, 1, 24, 24] -> canvases [n, 1, 40, 40]: turned, scaled and sheared a little, each
    at a random place."""
    angle, log_scale, shear = (
        (torch.rand(3, len(digits), generator=generator) * 2 - 1)
        * torch.tensor([[ROTATION], [SCALE], [SHEAR]])
    ).unbind(0)
    zoom, zero = torch.exp(log_scale), torch.zeros_like(angle)
    top = torch.stack([zoom * angle.cos(), zoom * (shear - angle.sin()), zero], 1)
    bottom = torch.stack([zoom * angle.sin(), zoom * angle.cos(), zero], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(digits.shape), align_corners=False)
    corners = torch.randint(0, PLACES, (len(digits), 2), generator=generator)
    return place(F.grid_sample(digits, grid, align_corners=False), corners)


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
    side = CANVAS // PATCH
    with torch.no_grad():
        pos_embed[0, 1:] = 0.2 * build_sincos2d_pos_embed([side, side], dim=pos_embed.shape[-1])
    return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices only: not for biases, norms, positions and the class token."""
    decay = [
        p for name, p in model.named_parameters() if p.ndim > 1 and name not in ("pos_embed", "cls_token")
    ]
    kept = {id(p) for p in decay}
    rest = [p for p in model.parameters() if id(p) not in kept]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def train(epochs: int, batch: int, peak: float, weight_decay: float, seed: int) -> nn.Module:
    """Returns the model after the last epoch, in eval mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    scans, labels, _ = load_scans("train")
    digits = enlarge(scans)
    model = new_model().train()
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=peak)
    steps = epochs * (len(digits) // batch)
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
            order = torch.randperm(len(digits), generator=generator)
            losses, right = [], 0
            for rows in order[: len(order) // batch * batch].split(batch):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, peak)
                logits = model(augment(digits[rows], generator))
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
def accuracy(model: nn.Module) -> float:
    """Share of the test digits that the model names rightly."""
    images, labels = load_digits("test")
    return float((model(images).argmax(1) == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the demo model on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; part of what makes runs repeat")
    parser.add_argument("--out", type=Path, required=True, help="where the .safetensors file goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    model = train(args.epochs, args.batch, args.lr, args.weight_decay, args.seed)
    seconds = time.perf_counter() - started
    recipe = {k: v for k, v in vars(args).items() if k != "out"}
    safetensors.torch.save_file(model.state_dict(), args.out, metadata={"recipe": json.dumps(recipe)})
    args.out.chmod(0o644)  # safetensors writes files that only their owner can read
    print(f"test accuracy {accuracy(model):.2%}; {seconds:.0f} s of training; {args.out}")


if __name__ == "__main__":
    main()
