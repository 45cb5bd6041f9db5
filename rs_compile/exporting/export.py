"""`export`: a rewritten model into a file, whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from rs_compile.exporting.errors import ExportError
from rs_compile.exporting.formats import FORMATS, format_of, openvino
from rs_compile.exporting.metadata import Info, describe
from rs_compile.exporting.program import program_of
from rs_compile.optimize import OptimizedModel

FormatName = Literal["torch.export", "aot-inductor", "onnx", "openvino", "executorch"]


def export(
    fast: OptimizedModel,
    args: Any,
    path: str | os.PathLike[str],
    *,
    format: FormatName | None = None,
    kwargs: Mapping[str, Any] | None = None,
    half_weights: bool = False,
    name: str = "",
    notes: Mapping[str, str] | None = None,
) -> Info:
    """Writes the rewritten model into a file that runs without rs_compile.

    The number of samples stays open where the model's code does not fix it; image size and dtype are the example's. A
    `TokenOutput` is a plain tuple in the file. ONNX and OpenVINO give the outputs flat, under the model's names.

    Args:
        fast: what `optimize` returned, in eval mode; one of its methods, `fast.forward_features`, works as well.
        args: a tensor [B, ...], or a tuple of the positional inputs.
        path: where to; the ending says the format: .pt2, .onnx, .xml (with .bin beside it), .pte.
        format: "aot-inductor" for a compiled .pt2 instead of torch.export's; else the ending's.
        kwargs: the keyword inputs.
        half_weights: store weights as float16 (OpenVINO).
        name: the model's, for the file's metadata; its class if not given.
        notes: what else the metadata should say.

    Returns:
        What the file says of itself, as `rs_compile.info(path)` reads it.

    Raises:
        ExportError: the format, the file or the model's state does not fit, or the exporter refuses an op.
        CaptureError, Refusal: see `OptimizedModel.forward`.
    """
    target = Path(path)
    if not isinstance(fast, OptimizedModel):
        raise ExportError(f"export takes what rs_compile.optimize returned, not {type(fast).__name__}")
    chosen = format_of(target, format)
    found = FORMATS[chosen]
    if half_weights and chosen != "openvino":
        raise ExportError(f"half_weights is OpenVINO's; for {chosen} convert the model first, fast.half()")
    if target.is_dir() or not target.parent.is_dir():
        raise ExportError(f"no file can be written at {target}; give one in a directory that exists")
    args = args if isinstance(args, tuple) else (args,)
    exported = program_of(fast, args, kwargs or {})
    options = fast._options
    model = name or exported.report.model
    said = describe(
        model, options.schedule, exported.report, exported.fixed_batch, chosen, found.packages, dict(notes or {})
    )
    write = partial(openvino, half=half_weights) if chosen == "openvino" else found.write
    # beside the target: a rename is then whole or not at all
    try:
        beside = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise ExportError(f"no file can be written in {target.parent}: {error.strerror}") from error
    with beside as folder:
        made = Path(folder) / target.name
        # as the program was made: with gradients attention with a learned mask takes another kernel
        with torch.no_grad():
            write(exported, made, said.to_json())
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == made):  # the file itself comes last
            os.replace(file, target.parent / file.name)
    return said
