"""Data sets of the Hugging Face hub, by their id `org/name`, through `datasets`.

Files are read, code is not run: `datasets` no longer executes loading scripts, and a data set that needs one is refused
with the way out. What was downloaded once is found again without a network.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from sft_dist.data.files import file_digest
from sft_dist.data.records import Record, Rejects
from sft_dist.data.tables import read_batches
from sft_dist.errors import ConfigError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ROWS_AT_ONCE = 1024
DEFAULT_SPLIT = "train"


def is_hub_id(path: str) -> bool:
    """Whether `path` has the form `org/name`; whether it is also a file here is for the caller to ask first."""
    return bool(_ID.fullmatch(path))


@lru_cache(maxsize=8)
def load(path: str, subset: str | None, split: str | None, revision: str | None) -> Any:
    """The `datasets.Dataset` of one split, downloaded or found in the cache. Raises ConfigError with the remedy."""
    return _load(path, subset, split, revision, streaming=False)


def stream(path: str, subset: str | None, split: str | None, revision: str | None) -> Any:
    """The `datasets.IterableDataset` of one split, read from the hub as it is gone through. Raises like `load`."""
    return _load(path, subset, split, revision, streaming=True)


def _load(path: str, subset: str | None, split: str | None, revision: str | None, *, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            path, name=subset, split=split or DEFAULT_SPLIT, revision=revision, streaming=streaming
        )
    except Exception as error:  # the library and the network below it raise what they like
        what = str(error).strip().partition("\n")[0]
        remedy = _remedy(f"{type(error).__name__} {error}")
        raise ConfigError(f"data.sources path={path}: {what or type(error).__name__}; {remedy}") from error


def _remedy(said: str) -> str:
    said = said.lower()
    if "script" in said:
        return "loading scripts are not run: use a revision with data files (refs/convert/parquet has them for many)"
    if "split" in said:
        return "set split= of the source to one that it has"
    if "config" in said:
        return "set subset= of the source to one that it has"
    return (
        "there is no such file here either; check the id and revision=, be online once so that it is cached "
        "(HF_HUB_OFFLINE unset), and log in with `hf auth login` if it is private"
    )


def name_of(path: str, subset: str | None, split: str | None, revision: str | None) -> str:
    """What its records call their file: `org/name@revision/subset/split`, without what was not given."""
    return path + (f"@{revision}" if revision else "") + "".join(f"/{part}" for part in (subset, split) if part)


def read_rows(dataset: Any, name: str, rejects: Rejects) -> Iterator[Record]:
    """The rows of a `datasets.Dataset`, mapped from disk, or of an `IterableDataset`."""
    yield from read_batches(dataset.with_format("arrow").iter(_ROWS_AT_ONCE), name, rejects)


def digest_of(dataset: Any, split: str | None) -> str:
    """SHA-256 over the Arrow files of a data set and the part of them that was asked for."""
    digest = hashlib.sha256(f"{split} {len(dataset)}".encode())
    for shard in dataset.cache_files:
        digest.update(file_digest(shard["filename"]).encode())
    return digest.hexdigest()
