"""Files that say what is to be seen in videos."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.evaluate.journal import EvaluationError

_SHOWN = 3  # files named in a message


def check_present(videos: Sequence[str], folder: Path, path: Path, what: str) -> None:
    """Raises EvaluationError where an annotation file speaks of videos that are not in the folder."""
    if not folder.is_dir():
        raise EvaluationError(f"there is no folder {folder}; give the one that holds the video files")
    absent = [name for name in videos if not (folder / name).is_file()]
    if absent:
        more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
        raise EvaluationError(
            f"{path} has {what} for videos that are not in {folder}: {', '.join(absent[:_SHOWN])}{more}; "
            f"put them there, or take their {what} out"
        )


def read_json(path: Path, shape: str) -> Any:
    """What an annotation file holds.

    Args:
        shape: what to write there, for messages.

    Raises:
        EvaluationError: there is no such file, or it is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read ({error.strerror}); write {shape}") from None
    except ValueError as error:
        raise EvaluationError(f"{path} is no JSON ({error}); write {shape}") from None
