"""The manifest of a checkpoint folder: which files belong to it, their sizes and SHA-256, and what the tensors are.

A folder is a checkpoint only when its manifest accounts for every byte of every file and for nothing else. The text is
canonical JSON that ends with its own digest, so that a flipped bit in the manifest itself is found as well, and file
names are plain names, so that nothing outside the folder is ever read.

    {"files": {"shard-00001-....safetensors": {"sha256": "...", "size": 1234}},
     "format": 1, "meta": {...}, "step": 100,
     "tensors": {"model.lm_head.weight": {"dtype": "float32", "shape": [128, 64]}},
     "versions": {"torch": "2.13.0"}, "world_size": 2, "written": "2026-01-31T12:00:00+0000", "digest": "..."}
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft_dist.errors import CheckpointError, StorageError

MANIFEST_NAME = "manifest.json"
RUN_KEY = "run"  # of `meta`: the name of the run, drawn at its start
FORMAT = 1
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """dtype by torch's name without the prefix, and the global shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a committed checkpoint says about itself. `meta` is the caller's JSON value."""

    step: int
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]
    meta: Mapping[str, Any]
    versions: Mapping[str, str]
    world_size: int
    written: str

    def render(self) -> str:
        """The canonical text, digest last. Floats are written so that they read back equal."""
        body = {"format": FORMAT, **asdict(self)}
        text = json.dumps(body, sort_keys=True, indent=1, allow_nan=False)
        return f'{text[:-2]},\n "digest": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'

    @property
    def num_bytes(self) -> int:
        """Bytes of all data files together."""
        return sum(entry.size for entry in self.files.values())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and fsync `folder/manifest.json`; raises OSError."""
    with (folder / MANIFEST_NAME).open("x") as file:
        file.write(manifest.render())
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Parse and prove `folder/manifest.json`; raises CheckpointError naming the file and what is wrong with it."""
    path = folder / MANIFEST_NAME
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: altered (not UTF-8)") from error
    try:
        manifest = _parse(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: altered or truncated (no valid manifest)") from error
    if manifest.render() != text:
        raise CheckpointError(f"{path}: altered (its digest does not match)")
    for name in manifest.files:
        if not is_plain_name(name):
            raise CheckpointError(f"{path}: names {name!r}, which is not a plain file name")
    return manifest


def is_plain_name(name: str) -> bool:
    """Whether `name` stays inside the folder: no separator, no parent, not hidden, not the manifest."""
    return bool(name) and "/" not in name and "\0" not in name and not name.startswith(".") and name != MANIFEST_NAME


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of a file, read in 1 MiB pieces; raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(size, digest.hexdigest())


def run_fault(manifest: Manifest, run: str | None) -> str | None:
    """What is wrong with a checkpoint in the folder of `run`: that it is another run's; None if it is not, or if the
    run is from before runs had names."""
    found = manifest.meta.get(RUN_KEY)
    return None if found == run or run is None else f"{MANIFEST_NAME}: of another run ({found}, this one is {run})"


def folder_fault(folder: Path, manifest: Manifest) -> str | None:
    """What is wrong with the folder as far as names and sizes tell: the first fault, naming the file; None if good."""
    if folder_step(folder) != manifest.step:
        return f"{MANIFEST_NAME}: belongs to step {manifest.step}, not to {folder.name}"
    present = {entry.name for entry in os.scandir(folder)} - {MANIFEST_NAME}
    for name in sorted(manifest.files.keys() | present):
        if name not in present:
            return f"{name}: missing"
        if name not in manifest.files:
            return f"{name}: not listed in {MANIFEST_NAME}"
        status = (folder / name).lstat()
        if not stat.S_ISREG(status.st_mode):
            return f"{name}: not a regular file"
        if status.st_size != manifest.files[name].size:
            return f"{name}: {status.st_size} bytes instead of {manifest.files[name].size}"
    return None


def content_fault(folder: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """The first of `names` whose SHA-256 differs, as text; None if all are good.

    Raises StorageError where reading is not permitted: that is no fault of the checkpoint.
    """
    for name in names:
        try:
            found = hash_file(folder / name)
        except PermissionError as error:
            raise StorageError(f"{folder / name}: no permission to read: fix its owner or mode") from error
        except OSError as error:
            return f"{name}: cannot be read ({errno.errorcode.get(error.errno or 0, 'error')})"
        if found != manifest.files[name]:
            return f"{name}: altered (SHA-256 differs from {MANIFEST_NAME})"
    return None


def fault(folder: Path, run: str | None = None) -> str | None:
    """Prove one checkpoint folder (of `run`) in full; the first fault, naming the file, or None. Reads only."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return str(error).removeprefix(f"{folder}/")
    found = run_fault(manifest, run) or folder_fault(folder, manifest)
    return found or content_fault(folder, manifest, sorted(manifest.files))


def step_name(step: int) -> str:
    """Folder name of a step: `step-00000100`."""
    return f"step-{step:08d}"


def folder_step(folder: Path) -> int | None:
    """The step that a folder's name stands for; None when it is no checkpoint name."""
    prefix, _, digits = folder.name.partition("-")
    is_name = prefix == "step" and len(digits) >= 8 and digits.isascii() and digits.isdigit()
    return int(digits) if is_name else None


def _parse(text: str) -> Manifest:
    body = json.loads(text)
    if body.pop("format") != FORMAT:
        raise ValueError("unknown format")
    body.pop("digest")
    body["files"] = {name: FileEntry(**entry) for name, entry in body["files"].items()}
    tensors = body["tensors"].items()
    body["tensors"] = {name: TensorEntry(entry["dtype"], tuple(entry["shape"])) for name, entry in tensors}
    return Manifest(**body)
