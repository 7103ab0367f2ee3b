"""A source of the recipe into records that know where they stand.

    data/x.jsonl      JSON, JSONL, CSV, TSV, each also as .gz or .zst; Parquet; Arrow
    data/, data/*.csv folders, globs
    s3://bucket/x     any of these behind a URL, through fsspec
    org/name          a data set of the hub, when nothing here has that path

Records stream: memory does not grow with the file. What is wrong is named with its place (`json_records`, `tables`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sft_dist.config.schema import SourceSection
from sft_dist.data import hub
from sft_dist.data.files import file_digest, file_version, find_files, open_bytes, open_text, unpacked_bytes
from sft_dist.data.json_records import read_json
from sft_dist.data.records import Pause, Record, Rejects
from sft_dist.data.tables import Cells, read_arrow, read_cells, read_parquet
from sft_dist.errors import ConfigError

__all__ = [
    "SUFFIXES",
    "Pause",
    "Record",
    "Rejects",
    "pin_notices",
    "read_records",
    "source_digests",
    "source_files",
    "source_sizes",
]

_JSON, _PACKED = (".json", ".jsonl", ".ndjson"), (".gz", ".zst")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_PARQUET, _ARROW = ".parquet", ".arrow"
_COMMIT = re.compile(r"[0-9a-f]{40}")
SUFFIXES = (
    *(kind + packing for kind in (*_JSON, *_SEPARATORS) for packing in ("", *_PACKED)),
    _PARQUET,
    _ARROW,
)


def read_records(source: SourceSection | str, rejects: Rejects) -> Iterator[Record]:
    """All records of a source, or of a path that needs no settings, in order of file name and place.

    With `Pause`s among them where `rejects` asks for that.
    """
    source = SourceSection(path=source) if isinstance(source, str) else source
    if _is_on_hub(source):
        name = hub.name_of(source.path, source.subset, source.split, source.revision)
        yield from hub.read_rows(_dataset(source), name, rejects)
        return
    for file in source_files(source):
        yield from read_file(file, source, rejects)


def stream_versions(source: SourceSection) -> dict[str, str]:
    """Name of each file that a streamed source stands for -> what tells one version of it from another without
    reading it; of a data set of the hub, its commit. Raises ConfigError where that is not pinned."""
    if not _is_on_hub(source):
        return {file: stream_version(file, source) for file in source_files(source)}
    if not _COMMIT.fullmatch(source.revision or ""):
        raise ConfigError(
            f"data.sources path={source.path}: streaming reads the hub again after an interruption: set revision= to "
            "the 40 digits of a commit"
        )
    name = hub.name_of(source.path, source.subset, source.split, source.revision)
    return {name: stream_version(name, source)}


def pin_notices(sources: Iterable[SourceSection]) -> list[str]:
    """A line for each data set of the hub whose bytes another day may be others."""
    return [
        f"data.sources path={source.path}: revision={source.revision or 'not set'} is no commit, so the rows may be "
        "others another day: set revision= to the 40 digits of one"
        for source in sources
        if _is_on_hub(source) and not _COMMIT.fullmatch(source.revision or "")
    ]


def stream_version(name: str, source: SourceSection) -> str:
    """Of one name of `stream_versions`, as it is now."""
    return str(source.revision) if _is_on_hub(source) else file_version(name)


def stream_file(name: str, source: SourceSection, rejects: Rejects) -> Iterator[Record]:
    """The records of one name of `stream_versions`."""
    if _is_on_hub(source):
        rows = hub.stream(source.path, source.subset, source.split, source.revision)
        return hub.read_rows(rows, name, rejects)
    return read_file(name, source, rejects)


def source_files(source: SourceSection | str) -> list[str]:
    """The files that a source stands for, sorted; none when it is a data set of the hub.

    Raises ConfigError when there is none or one cannot be read.
    """
    source = SourceSection(path=source) if isinstance(source, str) else source
    if _is_on_hub(source):
        return []
    files = find_files(source.path, SUFFIXES, source.split)
    if not files:
        is_folder = Path(source.path).is_dir()
        looked_for = f"a directory without {', '.join(SUFFIXES)} files" if is_folder else "no such file or glob"
        raise ConfigError(f"data.sources path={source.path}: {looked_for}")
    for file in files:
        if not file.endswith(SUFFIXES):
            raise ConfigError(f"data.sources path={file}: not a kind of file that is read; convert it to JSON Lines")
    return files


def source_digests(source: SourceSection) -> dict[str, str]:
    """Name of each file, or of the hub's data set -> SHA-256 of what it holds."""
    if _is_on_hub(source):
        name = hub.name_of(source.path, source.subset, source.split, source.revision)
        return {name: hub.digest_of(_dataset(source), source.split)}
    return {file: file_digest(file) for file in source_files(source)}


def source_sizes(source: SourceSection) -> dict[str, int]:
    """Name of each file, or of the hub's data set -> bytes of what it holds, unpacked where that is cheap to know."""
    if _is_on_hub(source):
        name = hub.name_of(source.path, source.subset, source.split, source.revision)
        return {name: _dataset(source).data.nbytes}
    return {file: unpacked_bytes(file) for file in source_files(source)}


def read_file(file: str, source: SourceSection, rejects: Rejects) -> Iterator[Record]:
    """The records of one file of a source, by the kind that its name says."""
    if file.endswith((_PARQUET, _ARROW)):
        with open_bytes(file) as stored:
            yield from (read_parquet if file.endswith(_PARQUET) else read_arrow)(stored, file, rejects)
        return
    separator = _SEPARATORS.get(Path(file.removesuffix(".gz").removesuffix(".zst")).suffix)
    with open_text(file) as text:
        if separator:
            cells = Cells(names=not _are_numbered(source), quotes=source.quotes, escapes=source.escapes)
            yield from read_cells(text, file, separator, cells, rejects)
        else:
            yield from read_json(text, file, rejects)


def _is_on_hub(source: SourceSection) -> bool:
    """Whether the path can only be an id of the hub. Keys that only the hub knows are refused for files."""
    path = source.path
    if hub.is_hub_id(path) and not path.endswith(SUFFIXES) and not Path(path).exists():
        return True
    for key in ("subset", "revision"):
        if getattr(source, key):
            raise ConfigError(f"data.sources path={path}: {key} is for data sets of the hub, this is a file or folder")
    return False


def _dataset(source: SourceSection) -> Any:
    return hub.load(source.path, source.subset, source.split, source.revision)


def _are_numbered(source: SourceSection) -> bool:
    """Whether columns are named by number: then text tables have no header row."""
    return any(isinstance(theirs, int) for theirs in source.columns.values())
