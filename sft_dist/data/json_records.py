"""JSON text into records: an array, one object, or one object per line, in memory that does not grow with the file.

What is not exactly right is named with line and byte: invalid UTF-8, broken or truncated JSON, duplicate keys, NaN,
NUL, lone surrogates. One bad record goes to `Rejects`, which stops or lists it. A text that cannot be cut into records
at all (truncated array, UTF-16) always stops, because nobody could say how much was lost.

Lines end at byte 0x0A and nowhere else; other line separators of Unicode are text.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from sft_dist.data.records import Record, Rejects
from sft_dist.data.strict_json import StrictJson, kind_of, skip_space
from sft_dist.errors import BadRecord

BOM = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 16 << 20
MAX_OBJECT_BYTES = 1 << 30  # of a file that is one object: a whole task file
_WINDOW_BYTES = 1 << 20
_SPACE = b" \t\r\n"  # JSON's own; other control characters are a line that is no record


def read_json(stream: io.BufferedReader, file: str, rejects: Rejects) -> Iterator[Record]:
    """The records of a JSON text of any of the three shapes."""
    head = stream.peek(_WINDOW_BYTES)
    refuse_utf16(head, file)
    if _is_lines(head, file):
        yield from _read_lines(stream, file, rejects)
    else:
        num_bom = len(stream.read(len(BOM))) if head.startswith(BOM) else 0
        yield from _read_values(_Window(stream, num_bom), file, rejects)


def refuse_utf16(head: bytes, file: str) -> None:
    """Raise BadRecord when a text begins like UTF-16 or UTF-32."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (b"\0" in head[:4] and len(head) > 3):
        raise BadRecord("it looks like UTF-16 or UTF-32: save the file as UTF-8", file=file, line=1)


def _is_lines(head: bytes, file: str) -> bool:
    """Whether each line is a record of its own: by content, since `.json` is used for all three shapes."""
    start = head.removeprefix(BOM).lstrip(_SPACE)
    if start.startswith(b"["):
        return False
    name = file.rpartition("/")[2]
    if ".jsonl" in name or ".ndjson" in name or b"\n" not in start.rstrip(_SPACE):
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
            long = BadRecord(f"line longer than {MAX_LINE_BYTES >> 20} MiB", file=file, line=line, byte=start)
            yield from rejects.reject(long)
            continue
        if line == 1 and raw.startswith(BOM):
            raw, start = raw[len(BOM) :], len(BOM)
        if not raw.strip(_SPACE):
            continue
        try:
            yield Record(parser.object(raw), file, line, start)
        except ValueError as flaw:
            yield from rejects.reject(BadRecord(str(flaw), file=file, line=line, byte=start))


def _skip_line(stream: BinaryIO, raw: bytes) -> int:
    """Read on to the end of an over-long line; returns the bytes skipped."""
    skipped = 0
    while raw and not raw.endswith(b"\n"):
        raw = stream.readline(MAX_LINE_BYTES)
        skipped += len(raw)
    return skipped


def _read_values(window: _Window, file: str, rejects: Rejects) -> Iterator[Record]:
    """An array of objects, or one object. Bytes that are not UTF-8 spoil only the record they stand in."""
    in_array = window.next_character() == "["
    if in_array:
        window.skip(1)
    longest = MAX_LINE_BYTES if in_array else MAX_OBJECT_BYTES
    while not (window.next_character() == "]" and in_array):
        line, byte, shares_line = window.place()
        try:
            value, flaw = window.value(longest)
        except ValueError as error:
            raise BadRecord(f"{error}: the file cannot be read on", file=file, line=line, byte=byte) from error
        if not flaw and not isinstance(value, dict):
            flaw = f"expected a JSON object, found {kind_of(value)}"
        if flaw:
            yield from rejects.reject(BadRecord(flaw, file=file, line=line, byte=byte))
        else:
            yield Record(value, file, line, byte, shares_line)
        if not in_array:
            break
        _pass_comma(window, file)
    if in_array:
        window.skip(1)
    if window.next_character():
        line, byte, _ = window.place()
        raise BadRecord("something follows the end of the JSON value", file=file, line=line, byte=byte)


def _pass_comma(window: _Window, file: str) -> None:
    """Go to the next element, or to the closing bracket, of an array."""
    following = window.next_character()
    if following == "]":
        return
    line, byte, _ = window.place()
    window.skip(len(following))
    if following != "," or window.next_character() == "]":
        reason = "expected ',' or ']' behind a record" if following else "the array ends early: the file is truncated"
        raise BadRecord(reason, file=file, line=line, byte=byte)


class _Window:
    """The part of a text that is held, and the line and byte of where reading is."""

    def __init__(self, stream: BinaryIO, byte: int) -> None:
        self._stream, self._parser = stream, StrictJson()
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text, self._at, self._ended = "", 0, False
        self._line, self._last_line, self._byte, self._counted = 1, 0, byte, 0

    def next_character(self) -> str:
        """The next one that is not white space, reading moves there; "" at the end."""
        while True:
            self._at = skip_space(self._text, self._at)
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._fetch()

    def skip(self, num_characters: int) -> None:
        """Move on by characters that are held."""
        self._at += num_characters

    def value(self, max_bytes: int) -> tuple[Any, str]:
        """(the value that begins here, its flaw or ""), read over; ValueError when the JSON is broken."""
        while True:
            broken = None
            try:
                value, end, flaw = self._parser.value_at(self._text, self._at)
            except ValueError as error:
                broken, end = error, len(self._text)
            if end < len(self._text) or self._ended:
                break
            if len(self._text) - self._at > max_bytes:
                raise ValueError(f"no end of the record within {max_bytes >> 20} MiB")
            self._fetch()
        if broken:
            self._parser.value_at(self._text[self._at :], 0)  # raises the same, with its place inside the record
            raise broken
        self._at = end
        return value, flaw

    def place(self) -> tuple[int, int, bool]:
        """(line, byte, whether the place asked for before was on the same line)."""
        self._count()
        shares, self._last_line = self._line == self._last_line, self._line
        return self._line, self._byte, shares

    def _count(self) -> None:
        """Lines and bytes up to where reading is."""
        passed = self._text[self._counted : self._at]
        self._line += passed.count("\n")
        self._byte += len(passed.encode("utf-8", "surrogateescape"))
        self._counted = self._at

    def _fetch(self) -> None:
        """Hold on to what is unread and read at least as much again: a long value is parsed a few times, not often."""
        self._count()
        raw = self._stream.read(max(_WINDOW_BYTES, len(self._text) - self._at))
        self._text, self._at, self._counted = self._text[self._at :] + self._decode(raw, final=not raw), 0, 0
        self._ended = not raw
