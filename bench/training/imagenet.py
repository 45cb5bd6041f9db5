"""Folders of class folders, through timm's loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from torch import nn

from bench.training.loop import Data
from bench.training.recipe import Recipe, TrainingError
from rs_compile.models import input_size

TEST_FOLDERS = ("val", "validation")


def imagenet_data(
    folder: Path, model: nn.Module, classes: int, recipe: Recipe, *, img_size: int | None, workers: int,
    device: torch.device,
) -> Data:  # fmt: skip
    """timm's random crops of `folder`/train and centre crops of `folder`/val, as the model wants them.

    Workers start anew each epoch, so that their random numbers are those of the epoch.

    Args:
        folder: holds train and val (or validation), each with a folder of pictures a class, named alike.
        model: a timm model, which knows its mean, deviation and interpolation.
        classes: of the model.
        recipe: batch size and augmentation.
        img_size: side of the images; None for the model's own.
        workers: processes of each loader.
        device: where batches go.

    Raises:
        TrainingError: a folder is missing or empty, or the classes of folders and model are not the same.
    """
    train, test = _dataset(folder, ("train",), training=True), _dataset(folder, TEST_FOLDERS, training=False)
    names, tested = (set(dataset.reader.class_to_idx) for dataset in (train, test))
    if odd := sorted(names ^ tested):
        raise TrainingError(
            f"{folder}: {len(odd)} classes have pictures in only one of train and val, first {odd[0]!r}; "
            "the class folders of the two must be the same"
        )
    if len(names) != classes:
        raise TrainingError(
            f"{folder} has {len(names)} class folders, the model {classes} classes; pass --num-classes {len(names)} "
            "with weights of so many classes, or the folder that the weights were made for"
        )
    if len(train) < recipe.batch:
        raise TrainingError(f"{folder}/train has {len(train)} pictures, fewer than --batch {recipe.batch}; lower it")
    config: dict[str, Any] = resolve_model_data_config(model, args={"input_size": input_size(model, img_size)})
    shared: dict[str, Any] = {
        **{key: config[key] for key in ("input_size", "mean", "std")},
        "num_workers": workers,
        "pin_memory": device.type == "cuda",
        "use_prefetcher": False,
        "persistent_workers": False,
    }
    return Data(
        create_loader(
            train,
            batch_size=recipe.batch,
            is_training=True,
            interpolation="random",
            auto_augment=recipe.auto_augment or None,
            color_jitter=recipe.color_jitter,
            re_prob=recipe.erase,
            re_mode="pixel",
            **shared,
        ),
        create_loader(
            test,
            batch_size=recipe.batch,
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
            **shared,
        ),
        classes,
    )


def _dataset(folder: Path, names: tuple[str, ...], training: bool) -> Any:
    if not folder.is_dir():
        raise TrainingError(f"there is no folder {folder}; give the one that holds train and val")
    found = next((folder / name for name in names if (folder / name).is_dir()), None)
    if found is None:
        raise TrainingError(f"{folder} has no folder {names[0]}; give the one that holds train and val")
    try:
        return create_dataset("", str(found), is_training=training, search_split=False)
    except RuntimeError as error:
        raise TrainingError(f"there are no pictures in {found}; put one folder a class there") from error
