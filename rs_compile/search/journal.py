"""What a search has found, a line each, so that an interrupted one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rs_compile.search.pictures import SearchError


class Journal:
    """Records by key, in memory and, where there is a path, in a file of a JSON object a line.

    Args:
        path: a file that an earlier search of the same setting may have left, or None.
        setting: what the records depend on: model, weights, pictures, seed.

    Raises:
        SearchError: the file is of another setting, or cannot be written.
    """

    def __init__(self, path: Path | None, setting: Mapping[str, Any]) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        self.resumed = 0
        if path is None:
            return
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise SearchError(f"resume={path}: no file can be written there; give one in a directory that exists")
        if path.exists() and path.stat().st_size:
            self._read(path, setting)
        else:
            self._write({"rs_compile search": setting})

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Any:
        return self._found[key]

    def add(self, key: str, value: Any) -> None:
        """Keeps a record, on disk too."""
        self._found[key] = value
        if self._path is not None:
            self._write({"key": key, "value": value})

    def _write(self, line: Any) -> None:
        assert self._path is not None
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self, path: Path, setting: Mapping[str, Any]) -> None:
        way_out = "give another file, or delete this one"
        lines = path.read_text().splitlines(keepends=True)
        try:
            found = json.loads(lines[0])["rs_compile search"]
            records = [json.loads(line) for line in lines[1:] if line.endswith("\n")]  # the last may be torn
            self._found = {record["key"]: record["value"] for record in records}
        except (ValueError, KeyError, TypeError):
            raise SearchError(f"resume={path} exists and is no search's file; {way_out}") from None
        if differs := [k for k in {**found, **setting} if found.get(k) != json.loads(json.dumps(setting.get(k)))]:
            of = "; ".join(f"{k} {found.get(k)} there, {setting.get(k)} here" for k in differs)
            raise SearchError(f"resume={path} is of another search ({of}); {way_out}")
        if not lines[-1].endswith("\n"):
            path.write_text("".join(lines[:-1]))
        self.resumed = len(records)
