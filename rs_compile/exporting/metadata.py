"""What a file says of itself: model, schedule, report and versions, as JSON inside it."""

from __future__ import annotations

import json
import platform
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from passes.graph.codes import Code
from rs_compile.exporting.errors import ExportError
from rs_compile.report import Report
from rs_compile.schedule import Schedule

KEY = "rs_compile"  # under which a file holds it
_WRITER = ("version", "rs_compile")  # in a schedule's JSON, what wrote it


@dataclass(frozen=True)
class Info:
    """What `export` wrote into a file; `content` is its JSON."""

    content: dict[str, Any]

    def to_json(self) -> str:
        """The content as JSON."""
        return json.dumps(self.content, indent=2)

    def __str__(self) -> str:
        c = self.content
        totals = c["report"]["totals"]
        rows = c["report"]["blocks"] or c["report"]["stages"]
        lengths = [row["tokens_out"] for row in c["report"]["blocks"]]
        lines = [
            f"{c['model']}, {c['format']}: {c['report']['signature']}",
            f"schedule: {json.dumps({k: v for k, v in c['schedule'].items() if v and k not in _WRITER})}",
            f"{len(rows)} blocks or stages, tokens behind each: {' '.join(map(str, lengths))}"
            if lengths
            else f"{len(rows)} stages",
            f"{totals['macs'] / 1e9:.3f} of {totals['macs_dense'] / 1e9:.3f} GMACs a sample",
            f"samples: {c['fixed_batch'] or 'any number'}",
            *(f"{name}: {text}" for name, text in c["notes"].items()),
            "made with " + ", ".join(f"{name} {v}" for name, v in c["versions"].items()),
        ]
        return "\n".join(lines)


def describe(
    model: str,
    schedule: Schedule,
    report: Report,
    fixed_batch: int,
    format: str,
    packages: Iterable[str],
    notes: dict[str, str],
) -> Info:
    """The content for a new file.

    Args:
        model: its name.
        fixed_batch: the number of samples that it is right for; 0 for any.
        format: the file's.
        packages: what it was made with, beside torch.
        notes: what else the caller wants it to say.
    """
    return Info(
        {
            "model": model,
            "format": format,
            "schedule": json.loads(schedule.to_json()),
            "fixed_batch": fixed_batch,
            "notes": notes,
            "report": json.loads(report.to_json()),
            "versions": {"rs-compile": _version("rs-compile"), "python": platform.python_version()}
            | {name: _version(name) for name in ("torch", *packages)},
        }
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of a checkout"


def info(path: str | Path) -> Info:
    """Reads what `export` wrote into a file; the model is not loaded.

    Raises:
        ExportError: there is no such file, or `export` did not write it.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"there is no file {path}")
    reader = {".pt2": _of_archive, ".onnx": _of_onnx, ".xml": _of_openvino, ".pte": _of_executorch}.get(path.suffix)
    if reader is None:
        raise ExportError(f"{path} is no file of rs_compile.export, which end in .pt2, .onnx, .xml or .pte")
    try:
        text = reader(path)
    except ImportError as error:
        raise ExportError(
            f"{error.name} is missing, which reads {path.suffix}; {WAY_OUT}", code=Code.MISSING
        ) from error
    except Exception as error:  # whatever a reader makes of a foreign or broken file
        raise ExportError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if text is None:
        raise ExportError(f"{path} does not say that rs_compile.export wrote it")
    return Info(json.loads(text))


WAY_OUT = "pip install onnx onnxscript onnxruntime openvino, or executorch for .pte"


def add_to_archive(path: Path, text: str) -> None:
    """Puts the content into a `.pt2` archive where torch.export.load looks for extra files."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/extra/{KEY}", text)


def _of_archive(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        name = next((n for n in archive.namelist() if n.endswith(f"/extra/{KEY}")), None)
        return archive.read(name).decode() if name is not None else None


def _of_onnx(path: Path) -> str | None:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return next((entry.value for entry in model.metadata_props if entry.key == KEY), None)


def _of_openvino(path: Path) -> str | None:
    found = ElementTree.parse(path).getroot().find(f"./rt_info/{KEY}")
    return found.get("value") if found is not None else None


def _of_executorch(path: Path) -> str | None:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(str(path))
    if KEY not in program.method_names:
        return None
    method = program.load_method(KEY)
    assert method is not None
    return str(method.execute([])[0])
