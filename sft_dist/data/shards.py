"""Tokenised records on disk under the name of their content, so that only what changed is tokenised again.

    chunks(source)          files cut into chunks of about a thousand records, at places that the records choose
    ShardCache.name(chunk)  SHA-256 over the records and the rules
    ShardCache.make(task)   the shard of that name; what its neighbour held of the same records is copied from there

Where a chunk ends depends on the record that ends it (content-defined chunking; Muthitacharoen, Chen and Mazieres,
2001), so inserted rows move no other boundary, and a shard knows neither file nor line. A changed record changes its
chunk's name; the chunk that stood at the same place before is found by its first record or the one before it, and every
record they share is copied from it. So the work is that of the records that changed. An interrupted preparation
continues where it stopped for the same reason.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import os
import secrets
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sft_dist.config.schema import SourceSection
from sft_dist.data.files import file_digest
from sft_dist.data.formats import detect_format, rename_columns
from sft_dist.data.sources import Pause, Record, Rejects, read_records
from sft_dist.data.store import with_places
from sft_dist.data.tokenise import BESIDE, Event, Rules, Shard, tokenise
from sft_dist.errors import BadRecord, DataError, StorageError

DIGEST_BYTES = 16
_MEAN_RECORDS, _MIN_RECORDS, _MAX_RECORDS = 1024, 128, 4096
MOST_REJECTS = 4096  # held at a time: some 600 bytes each
_ANCHORS_FILE = "anchors"


@dataclass(slots=True)
class Chunk:
    """Neighbouring records of one file and format, and the bad ones among them that could not be read at all.

    A chunk without records carries bad ones alone: so many that they could not wait for the end of the chunk they stand
    in, which follows with the `num_held` good records that were read before. They are listed at once, so beyond
    `MOST_REJECTS` unreadable records in one chunk, a readable one that is refused later stands behind unreadable ones
    of later lines. All others are listed in the order of the file.
    """

    source: SourceSection
    file: str
    format: str
    after: str  # digest of the record before the first, or of the file's name
    records: list[Record] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    num_held: int = 0
    is_trained: bool = True  # rows of evaluation sources are no matter of data.filters

    def add(self, record: Record) -> None:
        self.records.append(record)
        self.digests.append(hashlib.sha256(_said(record.value)).digest()[:DIGEST_BYTES])

    @property
    def is_full(self) -> bool:
        """Whether the last record ends the chunk: once in `_MEAN_RECORDS`, by its digest."""
        chosen = int.from_bytes(self.digests[-1][:4], "little") % _MEAN_RECORDS == 0
        return len(self.records) >= (_MIN_RECORDS if chosen else _MAX_RECORDS)


def chunks(source: SourceSection, rejects: Rejects, is_trained: bool = True) -> Iterator[Chunk]:
    """All records of a source in order. What `rejects` lists while reading goes to the chunk it stands in, or before.

    Under `on_bad_record: stop` the records before a bad one come out first: an earlier one of them may be bad too.
    """
    for chunk in cut(source, read_records(source, rejects), {}, rejects):
        chunk.is_trained = is_trained
        yield chunk


def cut(source: SourceSection, records: Iterable[Record], formats: dict[str, str], rejects: Rejects) -> Iterator[Chunk]:
    """`records` in chunks. `formats`: file -> format, those of files that were begun before, and filled here: the
    files of a directory need not be alike. Where chunks of good records end does not depend on the bad ones."""
    chunk = Chunk(source, "", "", "")
    try:
        for record in records:
            if isinstance(record, Pause):
                yield _bad_alone(source, record.file, formats, rejects, len(chunk.records))
                continue
            if record.file != chunk.file:
                if chunk.records:
                    yield from _closed(chunk, rejects)
                chunk = Chunk(source, record.file, formats.get(record.file, ""), _start_of(record.file))
            if not chunk.format:
                try:
                    chunk.format = formats[record.file] = _format_of(record, source)
                except BadRecord as error:
                    if rejects.reject(error):
                        yield _bad_alone(source, record.file, formats, rejects, 0)
                    continue
            chunk.add(record)
            if chunk.is_full:
                yield from _closed(chunk, rejects)
                chunk = Chunk(source, record.file, chunk.format, chunk.digests[-1].hex())
    except DataError:
        yield from _closed(chunk, rejects)
        raise
    yield from _closed(chunk, rejects)


def _said(value: dict[str, Any]) -> bytes:
    """Bytes that depend on what a record says: marshal's oldest form has no references, and is ten times faster."""
    try:
        return marshal.dumps(value, 2)
    except ValueError:  # dates and the like, from typed tables
        return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


def bad_records(chunk: Chunk, shard: Shard) -> list[BadRecord]:
    """Everything that is wrong in `chunk`, in the order of its files: found while reading, and behind it."""
    behind = (chunk.records[event.record].bad(event.reason) for event in shard.events if event.kind == "rejected")
    return sorted([*chunk.bad, *behind], key=lambda one: (one.file, one.line, one.byte))


def placed(chunk: Chunk, shard: Shard, files: dict[str, int]) -> pa.Table:
    """The rows of `chunk` with their places; `files` gets the number of a file that is new."""
    suffixes = [record.id.removeprefix(record.file) for record in chunk.records]
    owners, parts = shard.table["record"].to_pylist(), shard.table["part"].to_pylist()
    places = [suffixes[owner] + part for owner, part in zip(owners, parts, strict=True)]
    source = files.setdefault(chunk.file, len(files))
    table = shard.table.drop_columns(list(BESIDE))
    return with_places(table, [source] * len(places), places, _units(chunk, shard))


def _units(chunk: Chunk, shard: Shard) -> np.ndarray:
    """What no split may tear apart, for each row: its record, or the instance of a task file: uint64[N]."""
    records = np.array([int.from_bytes(digest[:8], "little") for digest in chunk.digests], np.uint64)
    instances = shard.table["instance"].to_numpy()
    return np.where(instances, instances, records[shard.table["record"].to_numpy()])


def _start_of(file: str) -> str:
    return hashlib.sha256(file.encode("utf-8", "surrogateescape")).hexdigest()[: 2 * DIGEST_BYTES]


def _closed(chunk: Chunk, rejects: Rejects) -> Iterator[Chunk]:
    chunk.bad = rejects.take()
    if chunk.records or chunk.bad:
        yield chunk


def _bad_alone(source: SourceSection, file: str, formats: dict[str, str], rejects: Rejects, num_held: int) -> Chunk:
    return Chunk(source, file, formats.get(file, ""), "", bad=rejects.take(), num_held=num_held)


def _format_of(record: Record, source: SourceSection) -> str:
    """The format of a file: as the recipe says, else what its first good record looks like."""
    if source.format != "auto":
        return source.format
    try:
        return detect_format(rename_columns(record.value, source.columns))
    except BadRecord as error:
        raise record.bad(error.reason) from None


@dataclass(frozen=True, slots=True)
class Task:
    """A shard to be made: its name, its records, and the shard that stood in its place before, if any."""

    name: str
    chunk: Chunk
    neighbour: str | None


class ShardCache:
    """The shards of one set of rules, a folder of files named by content."""

    def __init__(self, folder: Path, rules: Rules, rules_digest: str) -> None:
        self._folder, self._rules, self._rules_digest = folder / rules_digest[: DIGEST_BYTES * 2], rules, rules_digest
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{folder}: cannot be written ({error}); set data.cache_dir to a folder that can"
            ) from error

    def task(self, chunk: Chunk) -> Task | None:
        """What has to be done for `chunk`; None when its shard is there."""
        name = self.name(chunk)
        if not chunk.records or (self._folder / name).exists():
            return None
        reading, places = self._reading(chunk), (chunk.after, chunk.digests[0].hex())
        known = (self._anchors.get((reading, place)) for place in places)
        return Task(name, chunk, next((found for found in known if found), None))

    def shard(self, chunk: Chunk) -> Shard:
        """The rows of `chunk`, made here if its file is damaged or gone."""
        if not chunk.records:
            return tokenise((), chunk.source, chunk.format, self._rules_of(chunk))
        name = self.name(chunk)
        found = self.read(name)
        if found is None:
            self.make(Task(name, chunk, None))
            found = self.read(name)
        if found is None:
            raise StorageError(f"{self._folder / name}: cannot be read back; check the disk under data.cache_dir")
        self._remember(chunk, name)
        return found[0]

    def name(self, chunk: Chunk) -> str:
        """SHA-256 over rules, way of reading and records, hex."""
        digest = hashlib.sha256(self._reading(chunk).encode())
        digest.update(b"".join(chunk.digests))
        return digest.hexdigest()[: DIGEST_BYTES * 2]

    def _reading(self, chunk: Chunk) -> str:
        """SHA-256 over the rules and the way of reading, hex: shards that differ in it have nothing in common."""
        source = chunk.source
        forms = file_digest(source.template) if source.template else None
        columns = sorted((ours, str(theirs)) for ours, theirs in source.columns.items())
        is_scored = chunk.is_trained and self._rules.score is not None
        reading = [self._rules_digest, source.format == "auto", chunk.format, columns, forms, is_scored]
        return hashlib.sha256(json.dumps(reading).encode()).hexdigest()[: DIGEST_BYTES * 2]

    def expect_many(self) -> None:
        """Make ready to make many shards."""
        self._rules.expect_many()

    def make(self, task: Task) -> None:
        """Write the shard of `task`. Called in whatever process; writing it twice is harmless."""
        old = self.read(task.neighbour) if task.neighbour else None
        self._write(task.name, _reuse(task.chunk, old, self._rules_of(task.chunk)), task.chunk)

    def _rules_of(self, chunk: Chunk) -> Rules:
        """The score is asked of what is trained: rows of evaluation sources always stay."""
        return self._rules if chunk.is_trained else replace(self._rules, score=None)

    def read(self, name: str) -> tuple[Shard, list[bytes]] | None:
        """A shard and its records' digests; None when the file is not there or not whole."""
        try:
            data = pa.memory_map(str(self._folder / name)).read_buffer()
            checksum, body = int.from_bytes(data[:4], "little"), data[4:]
            if zlib.crc32(body) != checksum:
                return None
            table = pa.ipc.open_stream(body).read_all()
        except (OSError, pa.ArrowInvalid):
            return None
        header = json.loads(table.schema.metadata[b"events"])
        digests = table.schema.metadata[b"digests"]
        places = range(0, len(digests), DIGEST_BYTES)
        return Shard(table, [Event(**event) for event in header]), [digests[at : at + DIGEST_BYTES] for at in places]

    @cached_property
    def _anchors(self) -> dict[tuple[str, str], str]:
        """(reading, digest of the record before a chunk or of its first) -> name of the newest shard there."""
        try:
            lines = (self._folder / _ANCHORS_FILE).read_text("ascii", "replace").splitlines()
        except FileNotFoundError:
            return {}
        parts = [line.split() for line in lines]
        return {(words[0], place): words[3] for words in parts if len(words) == 4 for place in words[1:3]}

    def _remember(self, chunk: Chunk, name: str) -> None:
        """Make the shard of `chunk` findable as a neighbour. One short line is appended whole or not at all."""
        reading, first = self._reading(chunk), chunk.digests[0].hex()
        if self._anchors.get((reading, first)) != name:
            with open(self._folder / _ANCHORS_FILE, "a") as file:
                file.write(f"{reading} {chunk.after} {first} {name}\n")

    def _write(self, name: str, shard: Shard, chunk: Chunk) -> None:
        metadata = {"events": json.dumps([asdict(e) for e in shard.events]), "digests": b"".join(chunk.digests)}
        table = shard.table.replace_schema_metadata(metadata)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        body = sink.getvalue()
        temporary = self._folder / f".tmp-{name}-{secrets.token_hex(4)}"
        try:
            with open(temporary, "wb") as file:
                file.write(zlib.crc32(body).to_bytes(4, "little"))
                file.write(body)
            os.replace(temporary, self._folder / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(f"{self._folder}: cannot be written ({error}); free space there") from error


def _reuse(chunk: Chunk, old: tuple[Shard, list[bytes]] | None, rules: Rules) -> Shard:
    """The shard of `chunk`: records that `old` holds too are copied from it, the others tokenised."""
    shard, digests = old or (None, [])
    known = {digest: number for number, digest in enumerate(digests)}
    copied = {number: known[digest] for number, digest in enumerate(chunk.digests) if digest in known}
    missing = ((number, record) for number, record in enumerate(chunk.records) if number not in copied)
    fresh = tokenise(missing, chunk.source, chunk.format, rules)
    if shard is None or not copied:
        return fresh
    kept = _copy(shard, copied)
    table = pa.concat_tables([kept.table, fresh.table])
    order = np.argsort(table["record"].to_numpy(), kind="stable")
    events = sorted([*kept.events, *fresh.events], key=lambda event: event.record)
    return Shard(table.take(order), events)


def _copy(shard: Shard, copied: dict[int, int]) -> Shard:
    """The rows and events of old records, under their new numbers (new number -> old number)."""
    owners = shard.table["record"].to_numpy()  # ascending
    starts = np.searchsorted(owners, list(copied.values()), side="left")
    ends = np.searchsorted(owners, list(copied.values()), side="right")
    rows = [np.arange(start, end) for start, end in zip(starts, ends, strict=True)]
    numbers = np.repeat(list(copied), ends - starts)
    table = shard.table.take(np.concatenate([np.zeros(0, np.int64), *rows]))
    place = table.schema.get_field_index("record")
    table = table.set_column(place, "record", pa.array(numbers, pa.int32()))
    events = [
        Event(new, event.part, event.kind, event.reason)
        for new, old in copied.items()
        for event in shard.events
        if event.record == old
    ]
    return Shard(table, events)
