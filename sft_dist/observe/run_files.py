"""Small files of a run folder: JSON replaced in one rename, JSON lines appended.

A file is on the device before it takes another's name, so that a power cut leaves the old one or the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft_dist.errors import CheckpointError


def write_json(path: Path, value: Any) -> None:
    """Replace `path` in one rename, so that a reader never sees half of it."""
    _replace(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value, None when there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Rewrite `path` with the lines that `keep` wants, in one rename; returns the others."""
    lines = read_lines(path)
    dropped = [line for line in lines if not keep(line)]
    if path.exists():
        _replace(path, "".join(_line(record) for record in lines if keep(record)))
    return dropped


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(_line(record) for record in records)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines; the last one is left out while its writer was interrupted in it.

    So is what NUL bytes, which JSON never has, stand in: pages that a power cut has lost behind the last fsync. A line
    that was appended behind them counts. Raises CheckpointError naming a line that is no JSON.
    """
    if not path.exists():
        return []
    data, records = path.read_bytes(), []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n"), 1):
        try:
            records += [json.loads(line)] if line else []
        except ValueError as error:
            if b"\0" in line:
                records += _behind(line)
                continue
            raise CheckpointError(f"{path}:{number}: altered (no JSON); restore it from a copy or remove it") from error
    return records


def _behind(line: bytes) -> list[dict[str, Any]]:
    """The record behind a lost page, if there is a whole one."""
    with suppress(ValueError):
        if isinstance(record := json.loads(line.rpartition(b"\0")[2]), dict):
            return [record]
    return []


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
