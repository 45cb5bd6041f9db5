"""Accuracy, agreement and drift on a folder of pictures, of several models on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key
from torch import Tensor
from torch.nn import functional as F

from bench.evaluate.journal import EvaluationError, Journal, fingerprint, listing
from bench.evaluate.ranks import Ranks
from bench.evaluate.sweep import Skipped, spread, sweep
from rs_compile.models import read_image

TOP = 5


@dataclass(frozen=True)
class ImageScores:
    """What a model makes of the pictures.

    Args:
        top1, top5: percent of the pictures whose class is the model's first, or among its first five;
            None without labels.
        agreement: percent on which its first class is the reference's.
        cosine: cosine similarity of its logits and the reference's, mean over the pictures.
        kl: KL divergence of its class probabilities from the reference's, KL(reference || model), in nats,
            mean over the pictures.
        images: how many pictures were scored.
        skipped: the pictures that could not be read, the same for all models.
    """

    top1: float | None
    top5: float | None
    agreement: float
    cosine: float
    kl: float
    images: int
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Pictures:
    """The pictures of a folder, in order.

    Args:
        folder: where they are.
        files: relative to it.
        labels: class of each by the order of the class folders; None for a folder without class folders.
        classes: how many class folders; 0 without.
    """

    folder: Path
    files: tuple[str, ...]
    labels: tuple[int, ...] | None
    classes: int


def find_pictures(folder: Path, limit: int | None = None) -> Pictures:
    """Lists a folder of class folders, or a flat folder of pictures without labels.

    Class folders are in timm's natural order (2 before 10, otherwise as names sort: WordNet's ids as always), and
    a picture anywhere below one is of its class. Hidden folders are no classes, an empty class folder is one.

    Args:
        folder: the folder.
        limit: so many pictures at most, evenly spaced over the list.

    Raises:
        EvaluationError: there is no such folder, or no picture in it, or pictures lie beside class folders.
    """
    if not folder.is_dir():
        raise EvaluationError(f"there is no folder {folder}; give the one that holds the class folders, or pictures")
    inside = sorted((p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."), key=lambda p: natural_key(p.name))
    # timm knows which files are pictures; of its labels, made of the innermost folder, nothing is used
    found = [[Path(file) for file, _ in find_images_and_targets(str(sub))[0]] for sub in inside]
    loose = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix.lower() in get_img_extensions()]
    if loose and any(found):
        raise EvaluationError(
            f"{folder} holds both class folders ({inside[0].name}, ...) and loose pictures ({loose[0].name}, ...); "
            "leave one of the two there"
        )
    if not loose and not any(found):
        raise EvaluationError(f"there are no pictures in {folder}; give a folder of class folders, or of pictures")
    pairs = [(file, 0) for file in loose] or [(file, label) for label, files in enumerate(found) for file in files]
    chosen = [pairs[i] for i in spread(len(pairs), limit)]
    files = tuple(str(file.relative_to(folder)) for file, _ in chosen)
    labels = None if loose else tuple(label for _, label in chosen)
    return Pictures(folder, files, labels, 0 if loose else len(inside))


@torch.no_grad()
def evaluate_images(
    models: Mapping[str, Callable[[Tensor], Tensor]],
    reference: str,
    folder: Path,
    transform: Callable[[Image.Image], Tensor],
    *,
    classes: int,
    batch_size: int = 64,
    workers: int = 4,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    resume: Path | None = None,
    limit: int | None = None,
    identity: Mapping[str, Any] | None = None,
    colours: str = "RGB",
) -> dict[str, ImageScores]:
    """Runs all models on the same batches of a folder's pictures; only the last batch, and one with an unreadable
    picture, is smaller.

    Where two classes have the same logit, the one of lower index comes first.

    Args:
        models: name -> [B, C, H, W] in `dtype` on `device` -> logits [B, classes]. They are where they shall run
            (`Ranks.join().device(...)` under torchrun) and in eval mode.
        reference: the name of the dense model, which agreement and drift are against.
        folder: class folders, or pictures without labels: see `find_pictures`.
        transform: of a PIL image, as `timm.data.create_transform` makes it.
        classes: of the models.
        batch_size, workers: of the loader.
        device, dtype: of what the models are given.
        resume: file of what is done, to go on from: see `Journal`. Ctrl-C leaves it as it is.
        limit: so many pictures at most, evenly spaced over the folder.
        identity: what else decides the numbers and belongs to the evaluation's identity: schedules, backend.
            Weights are known from modules themselves.
        colours: PIL's mode of the pictures, "L" for models of one channel.

    Returns:
        The scores of every model by its name. Pictures that cannot be read are in `skipped`; a command that
        prints these scores names them and exits with an error code.

    Raises:
        EvaluationError: class folders that do not match `classes`, no picture that can be read, logits of another
            shape or that are not finite, a resume file of another evaluation, or see `find_pictures`.
    """
    if reference not in models:
        raise EvaluationError(f"the reference {reference!r} is none of the models; they are {', '.join(models)}")
    pictures = find_pictures(folder, limit)
    if pictures.labels is not None and pictures.classes != classes:
        raise EvaluationError(
            f"{folder} has {pictures.classes} class folders, the model {classes} classes; give the folder with one "
            "folder a class (often called val), a model of as many classes, or, for agreement and drift without "
            "labels, the pictures in one folder"
        )
    ranks = Ranks.join()
    device = ranks.device(device)
    evaluation = {
        "evaluation": "images",
        "pictures": len(pictures.files),
        "listing": listing((name, folder / name) for name in pictures.files),
        "labelled": pictures.labels is not None,
        "models": {name: fingerprint(model) for name, model in models.items()},
        "reference": reference,
        "transform": repr(transform),
        "dtype": str(dtype),
        "device": device.type,
        "batch size": batch_size,
        **(identity or {}),
    }

    def measure(indices: list[int], pixels: Tensor) -> dict[str, Any]:
        pixels = pixels.to(device, dtype)
        logits = {name: _logits(name, model(pixels), len(indices), classes) for name, model in models.items()}
        labels = None if pictures.labels is None else torch.tensor([pictures.labels[i] for i in indices])
        return {name: _sums(out, logits[reference], labels) for name, out in logits.items()}

    measured, skipped = sweep(
        _Read(folder, pictures.files, transform, colours),
        pictures.files,
        measure,
        batch_size=batch_size,
        workers=workers,
        journal=Journal(resume, evaluation, ranks),
        ranks=ranks,
        title=f"{len(pictures.files)} pictures",
        found_in=("pictures", folder),
    )
    return {name: _scores([batch[name] for batch in measured], skipped) for name in models}


@dataclass(frozen=True)
class _Read:
    folder: Path
    files: tuple[str, ...]
    transform: Callable[[Image.Image], Tensor]
    colours: str

    def __call__(self, index: int) -> Tensor:
        return self.transform(read_image(self.folder / self.files[index], self.colours))


def _logits(name: str, out: Any, count: int, classes: int) -> Tensor:
    if not isinstance(out, Tensor) or out.shape != (count, classes):
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise EvaluationError(f"{name} gave {got} for {count} pictures, not logits {[count, classes]}")
    if not out.isfinite().all():
        raise EvaluationError(f"{name} gave logits that are not finite; evaluate in float32 or bfloat16")
    return out.double().cpu()


def _sums(logits: Tensor, reference: Tensor, labels: Tensor | None) -> dict[str, float]:
    """Counts and sums over a batch [n, classes]; sums, so that batches and processes add up."""
    order = logits.argsort(dim=1, descending=True, stable=True)
    first = reference.argsort(dim=1, descending=True, stable=True)[:, 0]
    sums = {
        "images": len(logits),
        "agreement": int((order[:, 0] == first).sum()),
        "cosine": float(F.cosine_similarity(logits, reference).sum()),
        "kl": float(F.kl_div(logits.log_softmax(1), reference.log_softmax(1), reduction="sum", log_target=True)),
    }
    if labels is not None:
        hits = order[:, :TOP] == labels.unsqueeze(1)
        sums |= {"top1": int(hits[:, 0].sum()), "top5": int(hits.sum())}
    return sums


def _scores(batches: list[dict[str, float]], skipped: tuple[Skipped, ...]) -> ImageScores:
    total = {key: sum(batch[key] for batch in batches) for key in batches[0]}
    count = int(total["images"])
    percent = {key: 100 * total[key] / count for key in ("top1", "top5", "agreement") if key in total}
    return ImageScores(
        percent.get("top1"),
        percent.get("top5"),
        percent["agreement"],
        total["cosine"] / count,
        total["kl"] / count,
        count,
        skipped,
    )
