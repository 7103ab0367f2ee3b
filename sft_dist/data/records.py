"""One record and its place, and what happens to those that cannot be used."""

from __future__ import annotations

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


class Rejects:
    """What happens to bad records while reading: `stop` raises the first, `skip` lists them for the caller to take."""

    def __init__(self, policy: Literal["stop", "skip"] = "stop") -> None:
        self.policy = policy
        self.records: list[BadRecord] = []

    def reject(self, bad: BadRecord) -> None:
        """Raise `bad` under `stop`, list it under `skip`."""
        if self.policy == "stop":
            raise bad
        self.records.append(bad)
