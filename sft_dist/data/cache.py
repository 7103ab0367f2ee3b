"""Where prepared data lives, under which name, and who may write it.

The name is a SHA-256 over everything that decides the result: the bytes of the source files, how they are read, the
template's text, the tokenizer, the loss and split settings, and the code itself. One changed byte is another name, so a
cache entry is never stale and never needs a date. Processes that want the same entry at once meet at a file lock: the
first prepares, the others wait and read. No process group is needed, and a killed process gives its lock back.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sft_dist.config.schema import Recipe
from sft_dist.errors import StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FIRST_LOOK_SECONDS, _LOOK_SECONDS = 0.05, 1.0  # at a lock that another process holds; ever more rarely
_NAME_DIGITS = 32  # hex digits of a cache entry's name: 128 bits
_PLANNERS = ("packing", "layout", "plan", "stream_plan", "planning", "ledger")
_HELPERS = ("workers", "fork_server")
_READERS_OF_THE_STORE = frozenset(
    (*_PLANNERS, "collate", "loader", "inspect", "survey", "coverage", "workers", "fork_server")
)
_TOKEN_SETTINGS = ("seq_len", "long_examples", "loss_on", "prompt_loss_weight")
_SETTINGS = (
    *_TOKEN_SETTINGS,
    "eval_fraction",
    "test_fraction",
    "mixture_temperature",
    "near_duplicates",
    "on_bad_record",
    "max_bad_fraction",
)


def cache_root(recipe: Recipe) -> Path:
    """`data.cache_dir`, by default `.sft-cache` beside the run folder."""
    return Path(recipe.data.cache_dir) if recipe.data.cache_dir else Path(recipe.run.dir).parent / ".sft-cache"


def cache_name(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, template_text: str, file_digests: Mapping[str, str]
) -> str:
    """The entry's name. `file_digests`: path -> SHA-256 of every source file's bytes."""
    data = recipe.data
    parts = {
        "sources": [
            [role, source.model_dump()]
            for role in ("sources", "eval_sources", "test_sources")
            for source in getattr(data, role)
        ],
        "files": sorted(file_digests.items()),
        "template": template_text,
        "tokenizer": tokenizer_digest(tokenizer),
        "settings": {name: getattr(data, name) for name in _SETTINGS},
        "filters": data.filters.model_dump(),
        "seed": recipe.run.seed,
        "minhash": None if data.near_duplicates == "ignore" else _version("rensa"),
        "code": code_digest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:_NAME_DIGITS]


def rules_digest(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, template_text: str) -> str:
    """SHA-256 over everything besides the records that decides their tokens, hex."""
    parts = {
        "template": template_text,
        "tokenizer": tokenizer_digest(tokenizer),
        "settings": {name: getattr(recipe.data, name) for name in _TOKEN_SETTINGS},
        "score": recipe.data.filters.model_dump()["score"],
        "code": code_digest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over the whole tokenizer: vocabulary, merges, normalisation, special tokens, what it adds itself."""
    settings: dict[str, Any] = {
        "backend": tokenizer.backend_tokenizer.to_str(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "adds": [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@cache
def code_digest() -> str:
    """SHA-256 over the code that turns files into rows, so that an upgrade never reads what an older version made."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in _READERS_OF_THE_STORE:
            digest.update(path.name.encode() + path.read_bytes())
    for package in ("tokenizers", "tiktoken", "jinja2"):
        digest.update(f"{package} {_version(package)};".encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    """None where it is not installed: preparation can do without tiktoken."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def only_one(
    path: Path, waiting: Callable[[], None], alive: Callable[[], None] = lambda: None
) -> Iterator[Callable[[], None]]:
    """Hold the lock file `path`; calls `waiting` once when another process has it, then waits.

    Who holds it calls what this yields as often as it likes, to say that its work goes on. Who waits learns it from the
    file's time and calls `alive`: its own sign of life is the holder's, so where the holder hangs, all are silent.
    The kernel drops the lock with its process, however that ends. Raises StorageError when the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115 (closed below; the error belongs to opening alone)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error}); set data.cache_dir to a folder that can") from error
    with file:
        if not _is_ours(file):
            waiting()
            _wait(file, alive)
        yield _Sign(file)


class _Sign:
    """Called by who holds a lock file: dates it anew, once a second at most."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._given = file, -_LOOK_SECONDS

    def __call__(self) -> None:
        if time.monotonic() - self._given >= _LOOK_SECONDS:
            self._given = time.monotonic()
            os.utime(self._file.fileno())


def _wait(file: IO[bytes], alive: Callable[[], None]) -> None:
    """Until the lock is ours; `alive` is called whenever its holder has given a sign."""
    seen, pause = os.fstat(file.fileno()).st_mtime_ns, _FIRST_LOOK_SECONDS
    while not _is_ours(file):
        time.sleep(pause)
        pause = min(2 * pause, _LOOK_SECONDS)
        before, seen = seen, os.fstat(file.fileno()).st_mtime_ns
        if seen != before:
            alive()


def _is_ours(file: IO[bytes]) -> bool:
    """Take the lock of `file` if nobody else has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
