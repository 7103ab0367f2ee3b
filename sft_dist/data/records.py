"""One record and its place, and what happens to those that cannot be used."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

from sft_dist.errors import BadRecord


@dataclass(frozen=True, slots=True)
class Record:
    """One object of a file.

    `line` is 1-based: the line it begins on, or its row in a table that has no lines (Parquet, Arrow, data sets of the
    hub). `byte` is the offset of its first byte in the decompressed file, 0 in such tables.
    """

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


class Pause(Record):
    """No record: it stands among the records where so many bad ones are listed that the caller has to take them."""

    __slots__ = ()


class Rejects:
    """What happens to bad records while reading: `stop` raises the first, `skip` lists them for the caller to take.

    A run of bad records gives the caller no record at which to take them. With `most_held` the reader yields a `Pause`
    whenever so many are listed, and the caller takes them there. `taken` (line, byte): bad records up to there, of the
    one file that is read, were taken in an earlier reading and are passed over.
    """

    def __init__(
        self,
        policy: Literal["stop", "skip"] = "stop",
        most_held: int = sys.maxsize,
        taken: tuple[int, int] = (0, 0),
    ) -> None:
        self.policy, self._most_held, self._taken = policy, most_held, taken
        self.records: list[BadRecord] = []

    def reject(self, bad: BadRecord) -> tuple[Pause, ...]:
        """Raise `bad` under `stop`, list it under `skip`. What the reader yields in its place: nothing, or a pause."""
        if self.policy == "stop":
            raise bad.stopping()
        if (bad.line, bad.byte) <= self._taken:
            return ()
        self.records.append(bad)
        return (Pause({}, bad.file, bad.line, bad.byte),) if len(self.records) >= self._most_held else ()

    def take(self) -> list[BadRecord]:
        """What is listed, which the caller now keeps."""
        taken, self.records = self.records, []
        return taken
