"""Training with timm's optimizers, schedules, losses and moving average, to go on from where it was interrupted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn

from bench.training.checkpoint import check_identity, read_checkpoint, save_checkpoint, save_weights
from bench.training.recipe import Recipe, TrainingError

Tick = Callable[[int, int, str], None]
"""Called at every update with the updates done, those of the whole run, and how the last epoch went."""


class Batches(Protocol):
    """Gives the batches of one epoch, images [B, C, H, W] and labels [B], by the global random state."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Data:
    """What is trained on and what is evaluated on.

    Args:
        train: batches, in another order each epoch; all of the same size.
        test: batches, always the same.
        classes: how many.
    """

    train: Batches
    test: Batches
    classes: int


@dataclass(frozen=True)
class Trained:
    """What came of a run.

    Args:
        history: for each epoch "epoch" (0 is before the first), "accuracy" in percent of the averaged weights on the
            test batches, and but for 0 "loss", its mean, and "lr", that of the last update.
        last_accuracy: in percent, of the last weights themselves, not averaged.
        ema: the module with the averaged weights, in eval mode; rewritten like the one that was trained.
    """

    history: tuple[dict[str, float], ...]
    last_accuracy: float
    ema: nn.Module


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    device: torch.device,
    identity: Mapping[str, Any],
    checkpoint: Path | None = None,
    resume: Path | None = None,
    amp: bool = False,
    tick: Tick | None = None,
) -> Trained:
    """Trains `model`, which is changed, by the recipe; nothing is chosen by the test images, the last epoch counts.

    Every epoch draws its random numbers from the seed and its own number, so a run that is taken up again gives
    the numbers of one that was never interrupted, wherever such numbers repeat at all (on one machine's CPU).

    Args:
        model: images [B, C, H, W] -> logits [B, classes], on `device`. An `OptimizedModel` is averaged and evaluated
            in its rewritten form.
        data, recipe: see there.
        device: where batches go.
        identity: what decides the numbers besides the recipe, as JSON can write it.
        checkpoint: a .pt file to write after each epoch, with the averaged weights beside it as .safetensors.
        resume: such a file to go on from.
        amp: autocast to bfloat16.
        tick: told of progress.

    Raises:
        TrainingError: the checkpoint is none, or of another run; or the loss is not finite any more.
    """
    tick = tick or (lambda *_: None)
    whole = dict(identity) | {"recipe": asdict(recipe), "amp": amp}
    state = None
    if resume is not None:
        state = read_checkpoint(resume)
        check_identity(resume, state["identity"], whole)
    optimizer, scheduler = new_optimizer(model, recipe, len(data.train))
    ema = ModelEmaV3(model, decay=recipe.ema_decay)
    mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=data.classes)
    criterion = SoftTargetCrossEntropy() if recipe.mixes else LabelSmoothingCrossEntropy(recipe.smoothing)
    if state is None:
        history = [{"epoch": 0.0, "accuracy": accuracy(ema.module, data.test, device, amp)}]
    else:
        history = list(state["history"])
        model.load_state_dict(state["model"])
        ema.module.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
    updates = (len(history) - 1) * len(data.train)
    scheduler.step_update(updates)
    every = recipe.all_epochs * len(data.train)
    tick(updates, every, _told(history, recipe))
    for epoch in range(len(history), recipe.all_epochs + 1):
        random_seed(_epoch_seed(recipe.seed, epoch))
        model.train()
        losses: list[Tensor] = []
        for images, labels in data.train:
            images, labels = images.to(device), labels.to(device)
            if recipe.mixes:
                images, labels = mixup(images, labels)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate = optimizer.param_groups[0]["lr"]
            updates += 1
            ema.update(model, step=updates)
            scheduler.step_update(updates)
            losses.append(loss.detach())
            tick(updates, every, _told(history, recipe))
        mean = float(torch.stack(losses).mean())
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss of epoch {epoch} is {mean}; lower --lr, or warm up for longer"
                + (f"\n  {checkpoint} holds the epoch before" if checkpoint is not None and epoch > 1 else "")
            )
        scored = accuracy(ema.module, data.test, device, amp)
        history.append({"epoch": float(epoch), "loss": mean, "lr": rate, "accuracy": scored})
        if checkpoint is not None:
            states = {"model": model, "ema": ema.module, "optimizer": optimizer}
            whole_state = {name: part.state_dict() for name, part in states.items()}
            # first, so that a run interrupted in between does the epoch again and writes both
            save_weights(checkpoint.with_suffix(".safetensors"), ema.module.state_dict())
            save_checkpoint(checkpoint, {"identity": whole, "history": history} | whole_state)
        tick(updates, every, _told(history, recipe))
    return Trained(tuple(history), accuracy(model, data.test, device, amp), ema.module)


def new_optimizer(model: nn.Module, recipe: Recipe, updates: int) -> tuple[torch.optim.Optimizer, Scheduler]:
    """timm's optimizer and schedule; the schedule is told the updates done, `step_update`.

    Args:
        model: whose parameters are optimized.
        recipe: see there.
        updates: of an epoch.
    """
    optimizer = create_optimizer_v2(model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=recipe.epochs,
        cooldown_epochs=recipe.cooldown_epochs,
        min_lr=recipe.min_lr,
        warmup_lr=recipe.warmup_lr,
        warmup_epochs=recipe.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    assert scheduler is not None  # which it is for sched="none" only
    return optimizer, scheduler


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches, device: torch.device, amp: bool = False) -> float:
    """Percent of the images whose label is the model's first choice; the model is in eval mode afterwards."""
    model.eval()
    right = count = 0
    for images, labels in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            chosen = model(images.to(device)).argmax(1)
        right += int((chosen == labels.to(device)).sum())
        count += len(labels)
    return 100 * right / count


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _told(history: list[dict[str, float]], recipe: Recipe) -> str:
    last = history[-1]
    loss = f"loss {last['loss']:.3f}, " if "loss" in last else ""
    return f"epoch {len(history) - 1}/{recipe.all_epochs}: {loss}{last['accuracy']:.2f}%"
