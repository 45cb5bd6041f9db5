"""Training checkpoints: one file that a run goes on from, and beside it the averaged weights by themselves.

`NAME.pt` holds all of a run's state, so that one rename makes it whole or not at all; torch reads it with
weights_only. `NAME.safetensors` holds the averaged weights, under the model's own names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from bench.training.recipe import TrainingError

_FORMAT = "rs_compile training 1"
_SHOWN = 100  # characters of a value in a message


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes the state of a run; the file there before stays until the new one is on disk."""
    _replace(path, lambda fresh: torch.save({"format": _FORMAT} | dict(state), fresh))


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes weights as safetensors; the file there before stays until the new one is on disk."""
    content = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    _replace(path, lambda fresh: safetensors.torch.save_file(content, fresh, dict(metadata or {})))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, on the CPU.

    Raises:
        TrainingError: there is no such file, or it is something else.
    """
    if not path.is_file():
        raise TrainingError(f"--resume {path}: there is no such file; give the .pt file that --output got")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # on a file of another kind the unpickler raises whatever its bytes lead to
        state = None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise TrainingError(
            f"--resume {path} is no checkpoint of this command; give the .pt file that --output got "
            "(weights to start from go to --checkpoint)"
        )
    return state


def check_identity(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuses the checkpoint of another run.

    Args:
        path: of the checkpoint.
        there, here: what decides the numbers, in the checkpoint and now.

    Raises:
        TrainingError: they differ; says in what.
    """
    if differ := [key for key in {**there, **here} if there.get(key) != here.get(key)]:
        told = "; ".join(f"{key}: {_short(there.get(key))} there, {_short(here.get(key))} here" for key in differ)
        raise TrainingError(
            f"--resume {path} is of another run ({told})\n"
            "  way out: give the same options as then, or leave --resume out to start anew"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    fresh = path.with_name(f"{path.name}.new")
    write(fresh)
    with fresh.open("rb+") as file:
        os.fsync(file.fileno())
    fresh.chmod(0o644)  # safetensors writes files that only their owner can read
    fresh.replace(path)
