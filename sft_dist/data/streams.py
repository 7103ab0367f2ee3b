"""The streamed sources of a recipe as a `StreamStore`, named by everything that decides their tokens.

Files are not read to name them: their size and time of change stand for their bytes (their store's own digest behind a
URL, the commit for a data set of the hub). A changed file is another stream.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable

from sft_dist.config.schema import Recipe
from sft_dist.data.cache import cache_root
from sft_dist.data.files import file_digest
from sft_dist.data.report import PrepareReport
from sft_dist.data.sources import stream_versions
from sft_dist.data.stream_store import StreamStore
from sft_dist.data.stream_writer import StreamJob, StreamWriter
from sft_dist.data.tokenise import Rules
from sft_dist.errors import DataError, StorageError

STREAMS = "streams"
_CORES_PER_WORKER = 4  # ranks and the writer itself compute too


def open_stream(
    recipe: Recipe, rules: Rules, rules_digest: str, alive: Callable[[int], None], reads: bool
) -> StreamStore:
    """Map what was read of the recipe's streamed sources, once the first window is there.

    `alive` is called with the records read while that is waited for, here and later. `reads`: this process has the
    writer.
    Raises what reading raises, and DataError when the sources have ended without an example.
    """
    job = stream_job(recipe, rules, rules_digest)
    writer = StreamWriter(job) if reads else None
    store = StreamStore(job.folder, [source.path for source in job.sources], writer, alive)
    if not len(store):
        store.close()
        raise DataError(PrepareReport.from_dict(store.report()).nothing_to_train())
    return store


def stream_job(recipe: Recipe, rules: Rules, rules_digest: str) -> StreamJob:
    """What a writer of the recipe's streamed sources has to know; its folder is made."""
    data, sources = recipe.data, tuple(recipe.data.streams)
    versions = tuple(stream_versions(source) for source in sources)
    parts = {
        "sources": [source.model_dump() for source in sources],
        "versions": [sorted(version.items()) for version in versions],
        "forms": [file_digest(source.template) for source in sources if source.template],
        "rules": rules_digest,
        "bad records": [data.on_bad_record, data.max_bad_fraction],
    }
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_root(recipe) / STREAMS / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error}); set data.cache_dir to a folder that can") from error
    cores = len(os.sched_getaffinity(0))
    return StreamJob(
        folder=folder,
        sources=sources,
        versions=versions,
        rules=rules,
        on_bad_record=data.on_bad_record,
        max_bad_fraction=data.max_bad_fraction,
        num_workers=cores // _CORES_PER_WORKER if data.workers == "auto" else data.workers,
    )
