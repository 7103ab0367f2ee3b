"""Names of files, here or behind a URL, and their bytes unpacked.

A name with a scheme (`s3://bucket/x.jsonl`) goes through fsspec, anything else is a local path. Both may be a file, a
folder or a glob, and both end in `.gz` or `.zst` when they are packed.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sft_dist.errors import ConfigError, DataError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BUFFER_BYTES = 1 << 16
_BATCH_BYTES = 1 << 20
_CONTENT_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "checksum")  # an object store's own digest of the bytes
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
# What `datasets` writes beside its shards: descriptions, not data.
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def is_url(path: str) -> bool:
    """Whether `path` names its scheme."""
    return bool(_URL.match(path))


def find_files(path: str, suffixes: tuple[str, ...], split: str | None) -> list[str]:
    """The data files that a path, URL, folder or glob stands for, sorted; empty when nothing is there.

    `split` chooses among the splits of a folder that `datasets` saved.
    """
    given = Path(path)
    if split and (is_url(path) or not (given / "dataset_dict.json").is_file()):
        raise ConfigError(
            f"data.sources path={path}: split={split} is for data sets of the hub and folders that `datasets` saved"
        )
    if is_url(path):
        return _find_remote(path, suffixes)
    if not given.exists():
        return [name for name in sorted(glob.glob(path, recursive=True)) if Path(name).is_file()]
    return [str(file) for file in _find_in_folder(given, suffixes, split)] if given.is_dir() else [str(given)]


def _find_in_folder(folder: Path, suffixes: tuple[str, ...], split: str | None) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        held = sorted(file.parent.name for file in folder.glob("*/state.json"))
        if (split or "train") not in held:
            raise ConfigError(f"data.sources path={folder}: no split {split or 'train'!r}; it has {', '.join(held)}")
        folder = folder / (split or "train")
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _shards(folder)
    found = (file for file in folder.rglob("*") if file.name.endswith(suffixes) and file.name not in _DESCRIPTIONS)
    return sorted(file for file in found if file.is_file())


def _shards(folder: Path) -> list[Path]:
    """The shards of a data set that `datasets` saved; what its caches leave beside them is none."""
    try:
        shards = json.loads((folder / "state.json").read_bytes())["_data_files"]
        return [folder / shard["filename"] for shard in shards]
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder / 'state.json'}: damaged ({error}); save the data set again") from error


def _find_remote(url: str, suffixes: tuple[str, ...]) -> list[str]:
    system, path = _system_of(url)
    with _reading(url):
        if system.isfile(path):
            found = [path]
        elif system.isdir(path):
            found = [name for name in system.find(path) if name.endswith(suffixes)]
        else:
            found = [name for name in system.glob(path) if system.isfile(name)]
        return sorted(system.unstrip_protocol(name) for name in found)


def _system_of(url: str) -> tuple[Any, str]:
    """(fsspec's file system for the scheme, the path inside it)."""
    import fsspec  # type: ignore[import-untyped]

    scheme = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        driver = re.search(r"\b(\w+fs|requests|aiohttp|adlfs|paramiko|ocifs)\b", str(error))
        package = driver[1] if driver else f"'fsspec[{scheme}]'"
        raise ConfigError(
            f"data.sources path={url}: {scheme}:// needs a driver that is not installed: pip install {package}"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"data.sources path={url}: {scheme}:// is no kind of storage that fsspec knows ({error})"
        ) from error
    return system, path


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Whatever a file or a storage service says against reading, as one line."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}: broken gzip file, it ends early or was altered: {error}") from error
    except OSError as error:
        if name.endswith(".zst") and error.errno is None:
            raise DataError(f"{name}: broken zstd file, it ends early or was altered: {error}") from error
        raise DataError(f"{name}: cannot be read: {error.strerror or _first_line(error)}") from error
    except (ConfigError, DataError):
        raise
    except Exception as error:
        if not is_url(name):
            raise
        raise DataError(f"{name}: cannot be read: {_first_line(error)}; check the address and your access") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


@contextmanager
def open_bytes(name: str) -> Iterator[BinaryIO]:
    """The bytes of a file as they are stored, seekable. Raises DataError, in one line, while they are read too."""
    with _reading(name):
        if is_url(name):
            system, path = _system_of(name)
            with system.open(path, "rb") as file:
                yield file
        else:
            with open(name, "rb") as file:
                yield file


@contextmanager
def open_text(name: str) -> Iterator[io.BufferedReader]:
    """The unpacked bytes of a text file, as a stream that can be peeked into."""
    with open_bytes(name) as stored, io.BufferedReader(_unpacked(stored, name), _BUFFER_BYTES) as text:
        yield text


def _unpacked(stored: BinaryIO, name: str) -> Any:
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=stored)
    if name.endswith(".zst"):
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), "zstd")
    return stored


def file_digest(name: str) -> str:
    """SHA-256 over a file's bytes, or over the digest that its object store keeps of them."""
    if is_url(name):
        system, path = _system_of(name)
        with _reading(name):
            about = system.info(path)
        if tag := next((str(about[key]) for key in _CONTENT_TAGS if about.get(key)), None):
            return hashlib.sha256(f"{name} {tag} {about.get('size')}".encode()).hexdigest()
    digest = hashlib.sha256()
    with open_bytes(name) as file:
        while block := file.read(_BATCH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def file_version(name: str) -> str:
    """What tells a file from an altered one without reading it: size and time of change, or its store's digest."""
    if not is_url(name):
        with _reading(name):
            about = os.stat(name)
        return f"{about.st_size} {about.st_mtime_ns}"
    system, path = _system_of(name)
    with _reading(name):
        info = system.info(path)
    known = {key: str(info[key]) for key in (*_CONTENT_TAGS, *_TIMES, "size") if info.get(key) is not None}
    return json.dumps(known, sort_keys=True)


def unpacked_bytes(name: str) -> int:
    """Size of a file, unpacked where that is cheap to know: gzip keeps it, modulo 4 GiB, at its end (RFC 1952)."""
    with open_bytes(name) as file:
        num_bytes = file.seek(0, io.SEEK_END)
        if not name.endswith(".gz") or num_bytes < 4:
            return num_bytes
        file.seek(-4, io.SEEK_END)
        return int.from_bytes(file.read(4), "little")
