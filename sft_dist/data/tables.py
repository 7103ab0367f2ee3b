"""Tables into records: CSV and TSV text, Parquet, Arrow (files and streams, as `datasets` writes its shards).

Text tables hold text only: an empty cell is "", and names come from the header row or, when `Cells.names` is False,
from the number of the column ("0", "1", ...). Typed tables give every row every column, so what is null there is left
out of the record, also inside nested values: a message without `tool_calls` has none, whatever the rows beside it have.

A table that cannot be cut into rows always stops: a quote that is never closed, a damaged file. A row with too few or
too many cells, bytes that are not UTF-8 and NUL characters spoil only their record.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from sft_dist.data.json_records import BOM, MAX_LINE_BYTES, refuse_utf16
from sft_dist.data.records import Record, Rejects
from sft_dist.data.strict_json import text_flaw, texts_of
from sft_dist.errors import BadRecord, DataError

_ROWS_AT_ONCE = 1024  # turned into Python values together
_ARROW_FILE_MAGIC = b"ARROW1"
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_UNREADABLE = (ValueError, LookupError, ArithmeticError, TypeError)  # Arrow's value is none of Python's
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


@dataclass(frozen=True, slots=True)
class Cells:
    """How the cells of a text table are written."""

    names: bool = True  # the first row names the columns
    quotes: bool = True  # "a, b" is one cell, "" in it a quote (RFC 4180)
    escapes: bool = False  # \n, \t, \r and \\ stand for what they do in most languages


def read_cells(
    stream: io.BufferedReader, file: str, separator: str, cells: Cells, rejects: Rejects
) -> Iterator[Record]:
    """The rows of a CSV or TSV text; each record's place is the line its row begins on."""
    refuse_utf16(stream.peek(len(BOM) + 1), file)
    lines = _Lines(stream, file)
    rows = _quoted_rows(lines, separator) if cells.quotes else _plain_rows(lines, separator)
    names: list[str] = []
    for line, byte, row in rows:
        row = [_unescaped(cell) for cell in row] if cells.escapes else row
        if not names:
            names = _names(row, file, line, byte) if cells.names else [str(number) for number in range(len(row))]
            if cells.names:
                continue
        flaw = next((found for cell in row if (found := text_flaw(cell))), "")
        if len(row) != len(names):
            flaw = f"the row has {len(row)} cells, the first one {len(names)}"
        if flaw:
            yield from rejects.reject(BadRecord(flaw, file=file, line=line, byte=byte))
        else:
            yield Record(dict(zip(names, row, strict=True)), file, line, byte)


def _names(row: list[str], file: str, line: int, byte: int) -> list[str]:
    if doubled := _doubled(row):
        remedy = "if this is no header row, number the cells in columns= of the source"
        raise BadRecord(f"{doubled}; {remedy}", file=file, line=line, byte=byte)
    return row


def _doubled(names: list[str]) -> str:
    """What is wrong with the names of columns, or ""."""
    doubled = next((name for name in names if names.count(name) > 1), None)
    return "" if doubled is None else f"two columns are called {doubled!r}"


def _unescaped(cell: str) -> str:
    return _ESCAPE.sub(lambda found: _ESCAPED.get(found[1], found[0]), cell) if "\\" in cell else cell


class _Lines:
    """The decoded lines of a table, and where the next one begins."""

    def __init__(self, stream: BinaryIO, file: str) -> None:
        self._stream, self.file = stream, file
        self.line, self.byte = 1, 0

    def __iter__(self) -> Iterator[str]:
        while raw := self._stream.readline(MAX_LINE_BYTES + 1):
            if len(raw) > MAX_LINE_BYTES:
                raise self.broken(f"line longer than {MAX_LINE_BYTES >> 20} MiB", self.line, self.byte)
            text = raw.removeprefix(BOM) if self.byte == 0 else raw
            self.line, self.byte = self.line + 1, self.byte + len(raw)
            yield text.decode("utf-8", "surrogateescape")

    def broken(self, reason: str, line: int, byte: int) -> BadRecord:
        return BadRecord(f"{reason}: the file cannot be read on", file=self.file, line=line, byte=byte)


def _plain_rows(lines: _Lines, separator: str) -> Iterator[tuple[int, int, list[str]]]:
    """(line, byte, cells) of each row that is a line."""
    line, byte = lines.line, lines.byte
    for text in lines:
        if text.strip("\r\n"):
            yield line, byte, text.removesuffix("\n").removesuffix("\r").split(separator)
        line, byte = lines.line, lines.byte


def _quoted_rows(lines: _Lines, separator: str) -> Iterator[tuple[int, int, list[str]]]:
    """(line, byte, cells) of each row; quoted cells may hold separators and line ends."""
    csv.field_size_limit(MAX_LINE_BYTES)  # of the whole process; the default is 128 KiB
    rows = csv.reader(iter(lines), delimiter=separator, strict=True)
    while True:
        line, byte = lines.line, lines.byte
        try:
            row = next(rows, None)
        except csv.Error as error:
            reason = f"{error} (cells are not quoted here? set quotes=false of the source)"
            raise lines.broken(reason, line, byte) from error
        if row is None:
            return
        if row:
            yield line, byte, row


def read_parquet(stored: BinaryIO, file: str, rejects: Rejects) -> Iterator[Record]:
    """The rows of a Parquet file, a row group at a time."""
    import pyarrow.parquet as pq

    with _whole(file, "Parquet"):
        yield from read_batches(pq.ParquetFile(stored).iter_batches(_ROWS_AT_ONCE), file, rejects)


def read_arrow(stored: BinaryIO, file: str, rejects: Rejects) -> Iterator[Record]:
    """The rows of an Arrow file or stream, a record batch at a time."""
    import pyarrow as pa

    magic = stored.read(len(_ARROW_FILE_MAGIC))
    stored.seek(0)
    with _whole(file, "Arrow"):
        if magic == _ARROW_FILE_MAGIC:
            reader = pa.ipc.open_file(stored)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(stored))
        yield from read_batches(batches, file, rejects)


@contextmanager
def _whole(file: str, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's or the service's word, not the format's
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: broken {kind} file, it ends early or was altered: {reason}") from error


def read_batches(batches: Iterable[Any], file: str, rejects: Rejects) -> Iterator[Record]:
    """The rows of Arrow record batches or tables, numbered from 1."""
    number = 0
    for batch in batches:
        if doubled := _doubled(batch.schema.names):
            raise BadRecord(f"{doubled}: rename one", file=file, line=1)
        for start in range(0, len(batch), _ROWS_AT_ONCE):
            for value, flaw in _values(batch.slice(start, _ROWS_AT_ONCE)):
                number += 1
                if flaw:
                    yield from rejects.reject(BadRecord(flaw, file=file, line=number))
                else:
                    yield Record(value, file, number, 0)


def _values(batch: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """(value, flaw or "") of each row; a row with bytes that are not UTF-8 is found by reading rows one by one."""
    try:
        values = batch.to_pylist(maps_as_pydicts="strict")
    except _UNREADABLE:
        if len(batch) == 1:
            yield {}, _unreadable(batch)
            return
        for row in range(len(batch)):
            yield from _values(batch.slice(row, 1))
        return
    for value in values:
        record = _plain(value)
        yield record, next((flaw for text in texts_of(record) if (flaw := text_flaw(text))), "")


def _unreadable(batch: Any) -> str:
    """Which column of a batch cannot be read, and why."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.to_pylist(maps_as_pydicts="strict")
        except _UNREADABLE as error:
            return f"the cell of column {name!r} cannot be read: {error}"
    return "a cell cannot be read"


def _plain(value: Any) -> Any:
    """The value without nulls, and with keys that are text."""
    if isinstance(value, dict):
        return {key if type(key) is str else str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and isinstance(next((i for i in value if i is not None), None), dict | list):
        return [_plain(item) for item in value]
    return value
