"""Files of JSON into records that know where they stand.

`.json` (an array, one object, or lines), `.jsonl`, either gzipped, a glob or a directory of these. What is not exactly
right is named with file, line and byte: invalid UTF-8, broken or truncated JSON, duplicate keys, NaN, NUL, lone
surrogates. One bad record goes to `Rejects`, which stops or lists it. A file that cannot be cut into records at all
(truncated array, broken gzip, UTF-16) always stops, because nobody could say how much was lost.

Lines end at byte 0x0A and nowhere else; other line separators of Unicode are text.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from sft_dist.data.strict_json import StrictJson, kind_of, skip_space
from sft_dist.errors import BadRecord, ConfigError, DataError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz")
MAX_LINE_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON object: `line` is 1-based, `byte` the offset of its first byte in the decompressed file."""

    value: dict[str, Any]
    file: str
    line: int
    byte: int
    shares_line: bool = False  # another record of the file begins on the same line

    @property
    def id(self) -> str:
        """`file:line`, with `+byte` where the line alone would not tell records apart."""
        return f"{self.file}:{self.line}" + (f"+{self.byte}" if self.shares_line else "")

    def bad(self, reason: str) -> BadRecord:
        """The error that says why this record cannot be used."""
        return BadRecord(reason, file=self.file, line=self.line, byte=self.byte)


class Rejects:
    """What happens to bad records: `stop` raises the first, `skip` lists them within a budget."""

    def __init__(self, policy: Literal["stop", "skip"] = "stop", max_bad_fraction: float = 0.01) -> None:
        self.policy, self.max_bad_fraction = policy, max_bad_fraction
        self.records: list[BadRecord] = []

    def reject(self, bad: BadRecord) -> None:
        """Raise `bad` under `stop`, list it under `skip`."""
        if self.policy == "stop":
            raise bad
        self.records.append(bad)

    def finish(self, num_total: int) -> None:
        """Raise DataError when more than `max_bad_fraction` of all `num_total` records, bad ones included, are bad."""
        num_bad = len(self.records)
        if num_bad > self.max_bad_fraction * num_total:
            raise DataError(
                f"{num_bad} of {num_total} records are bad ({num_bad / max(num_total, 1):.1%}), more than "
                f"data.max_bad_fraction={self.max_bad_fraction}; the first: {self.records[0]}"
            )


def read_records(path: str, rejects: Rejects) -> Iterator[Record]:
    """All records of a file, glob or directory, in order of file name and place."""
    for file in source_files(path):
        yield from read_file(file, rejects)


def source_files(path: str) -> list[Path]:
    """The files that `path` stands for, sorted. Raises ConfigError when there is none or one cannot be read."""
    given = Path(path)
    if given.is_dir():
        files = sorted(file for file in given.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
    elif given.exists():
        files = [given]
    else:
        files = sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())
    if not files:
        looked_for = f"a directory without {', '.join(SUFFIXES)} files" if given.is_dir() else "no such file or glob"
        raise ConfigError(f"data.sources path={path}: {looked_for}")
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise ConfigError(f"data.sources path={file}: not a kind of file that is read; convert it to JSON Lines")
    return files


def read_file(file: Path, rejects: Rejects) -> Iterator[Record]:
    """The records of one file."""
    try:
        with gzip.open(file) if file.name.endswith(".gz") else open(file, "rb") as opened:
            stream = cast(BinaryIO, opened)
            head = _peek(stream)
            if _looks_like_utf16(head):
                raise BadRecord("it looks like UTF-16 or UTF-32: save the file as UTF-8", file=str(file), line=1)
            if _is_lines(head, file):
                yield from _read_lines(stream, str(file), rejects)
            else:
                yield from _read_values(stream.read(), str(file), rejects)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: broken gzip file, it ends early or was altered: {error}") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def _peek(stream: Any) -> bytes:
    """The first bytes, without moving on."""
    head: bytes = stream.read(1 << 16)
    stream.seek(0)
    return head


def _looks_like_utf16(head: bytes) -> bool:
    return head.startswith((b"\xff\xfe", b"\xfe\xff")) or (b"\0" in head[:4] and len(head) > 3)


def _is_lines(head: bytes, file: Path) -> bool:
    """Whether each line is a record of its own: by content, since `.json` is used for all three shapes."""
    start = head.removeprefix(_BOM).lstrip()
    if start.startswith(b"["):
        return False
    if ".jsonl" in file.name or ".ndjson" in file.name or b"\n" not in start.rstrip():
        return True
    try:
        json.loads(start.split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        return False
    return True


def _read_lines(stream: BinaryIO, file: str, rejects: Rejects) -> Iterator[Record]:
    parser = StrictJson()
    line, byte = 0, 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        line, start, byte = line + 1, byte, byte + len(raw)
        if len(raw) > MAX_LINE_BYTES:
            byte += _skip_line(stream, raw)
            rejects.reject(BadRecord(f"line longer than {MAX_LINE_BYTES >> 20} MiB", file=file, line=line, byte=start))
            continue
        if line == 1 and raw.startswith(_BOM):
            raw, start = raw[len(_BOM) :], len(_BOM)
        if not raw.strip():
            continue
        try:
            yield Record(parser.object(raw), file, line, start)
        except ValueError as flaw:
            rejects.reject(BadRecord(str(flaw), file=file, line=line, byte=start))


def _skip_line(stream: BinaryIO, raw: bytes) -> int:
    """Read on to the end of an over-long line; returns the bytes skipped."""
    skipped = 0
    while raw and not raw.endswith(b"\n"):
        raw = stream.readline(MAX_LINE_BYTES)
        skipped += len(raw)
    return skipped


def _read_values(data: bytes, file: str, rejects: Rejects) -> Iterator[Record]:
    """An array of objects, or one object. Bytes that are not UTF-8 spoil only the record they stand in."""
    place = _Place(data.removeprefix(_BOM).decode("utf-8", "surrogateescape"), len(data) - len(data.removeprefix(_BOM)))
    text, parser = place.text, StrictJson()
    at = skip_space(text, 0)
    in_array = text.startswith("[", at)
    at = skip_space(text, at + 1) if in_array else at
    while not (in_array and text.startswith("]", at)):
        line, byte, shares_line = place.of(at)
        try:
            value, end, flaw = parser.value_at(text, at)
        except ValueError as error:
            raise BadRecord(f"{error}: the file cannot be read on", file=file, line=line, byte=byte) from error
        if not flaw and not isinstance(value, dict):
            flaw = f"expected a JSON object, found {kind_of(value)}"
        if flaw:
            rejects.reject(BadRecord(flaw, file=file, line=line, byte=byte))
        else:
            yield Record(value, file, line, byte, shares_line)
        at = skip_space(text, end)
        if not in_array:
            break
        at = _after_comma(text, at, file, place)
    end = skip_space(text, at + 1 if in_array else at)
    if end != len(text):
        line, byte, _ = place.of(end)
        raise BadRecord("something follows the end of the JSON value", file=file, line=line, byte=byte)


def _after_comma(text: str, at: int, file: str, place: _Place) -> int:
    """Where the next element, or the closing bracket, of an array begins."""
    following = text[at : at + 1]
    if following == "]":
        return at
    after = skip_space(text, at + 1)
    if following != "," or text.startswith("]", after):
        line, byte, _ = place.of(at)
        reason = "expected ',' or ']' behind a record" if following else "the array ends early: the file is truncated"
        raise BadRecord(reason, file=file, line=line, byte=byte)
    return after


class _Place:
    """Line and byte of ascending positions in a text."""

    def __init__(self, text: str, byte: int) -> None:
        self.text = text
        self._at, self._line, self._byte = 0, 1, byte
        self._last_line = 0

    def of(self, at: int) -> tuple[int, int, bool]:
        """(line, byte, whether an earlier asked-for position was on the same line)."""
        passed = self.text[self._at : at]
        self._line += passed.count("\n")
        self._byte += len(passed.encode("utf-8", "surrogateescape"))
        self._at = at
        shares, self._last_line = self._line == self._last_line, self._line
        return self._line, self._byte, shares
