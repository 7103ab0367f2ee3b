"""The examples of a stream as far as it has been read: segments on disk, the next one made while a step computes.

    FOLDER/segment-000000/corpus/    some 16,000 tokenised rows, as in a token store
    FOLDER/segment-000000/state.json where reading stood behind it, counts so far, a digest of all tokens up to here
    FOLDER/end.json                  the sources are used up: how many segments there are
    FOLDER/progress                  who works on the next segment, chunks and records that he has read

One process on each machine has the writer (`stream_writer`), which stays a few segments ahead of what was asked for;
all ranks map the same segments. Who asks for an example that is not there yet waits. Segments are kept: what was
trained on can be proven, shown again, and gone through a second time.
"""

from __future__ import annotations

import json
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sft_dist.data.layout import ExampleNumbers
from sft_dist.data.store import CORPUS, GATHERED, Corpus, TokenStore, count_targets
from sft_dist.data.stream_plan import WINDOW_EXAMPLES
from sft_dist.errors import DataError
from sft_dist.types import TokenizedExample

STATE_FILE, END_FILE, PROGRESS_FILE = "state.json", "end.json", "progress"
_SEGMENTS_MAPPED = 16  # at a time
_LOOK_SECONDS = 0.02
_SEGMENTS_AHEAD = 2


Alive = Callable[[int], None]


class Writer(Protocol):
    """What makes segments."""

    def want(self, num_segments: int) -> None:
        """Make so many segments, in all."""

    def check(self) -> None:
        """Raise what ended the writer, if something did."""


def segment_folder(folder: Path, number: int) -> Path:
    return folder / f"segment-{number:06d}"


def read_state(folder: Path, number: int) -> dict[str, Any] | None:
    """What is known behind segment `number`; None while it is not there."""
    try:
        state: dict[str, Any] = json.loads((segment_folder(folder, number) / STATE_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _damaged(segment_folder(folder, number), error) from error
    return state


def read_end(folder: Path) -> int | None:
    """How many segments there are in all; None while nobody has seen the end."""
    try:
        return int(json.loads((folder / END_FILE).read_text("utf-8"))["segments"])
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(folder / END_FILE, error) from error


@dataclass(frozen=True, slots=True)
class _Known:
    """A segment that was seen on disk."""

    end: int  # examples of the stream up to its last
    digest: str  # of their tokens
    sources: Sequence[tuple[int, int]]  # (source, rows) of its runs of rows


class StreamStore:
    """What a `TokenStore` answers, for examples numbered in the order of the stream.

    `len`, iteration, `num_tokens` and `supervised_share` are those of the first window, which is all that is sure to be
    there. `writer` None: another process of this machine has it. `alive` is called on the main thread while it waits
    and the writer gets on, with the records that were read since reading began; 0 where another process tells.
    """

    def __init__(
        self, folder: Path, sources: Sequence[str], writer: Writer | None, alive: Alive = lambda records: None
    ) -> None:
        self.folder, self.sources, self.fingerprint = folder, list(sources), folder.name
        self._writer, self._alive = writer, alive
        self._known: list[_Known] = []
        self._lock = threading.Lock()
        self._corpus = lru_cache(_SEGMENTS_MAPPED)(self._map)
        self.is_new = not segment_folder(folder, 0).exists()  # its first window is read now
        first = self.numbers(0, WINDOW_EXAMPLES)
        self._first_window = len(first.lengths)
        self.num_tokens = int(first.lengths.sum(dtype=np.int64))
        self.supervised_share = int(first.num_loss_tokens.sum(dtype=np.int64)) / max(self.num_tokens, 1)

    def __len__(self) -> int:
        return self._first_window

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (self.example(index) for index in range(len(self)))

    @property
    def lengths(self) -> Lengths:
        return Lengths(self)

    def numbers(self, first: int, last: int) -> ExampleNumbers:
        """Of the examples at places first..last-1, once they are there; fewer only where the stream ends.

        Raises what ended the writer, and DataError for a damaged segment.
        """
        end = min(last, self._read_up_to(last))
        pieces = [self._gather(number, start, stop) for number, start, stop in self._pieces(first, end)]
        columns = zip(*pieces, strict=True) if pieces else [[np.zeros(0, np.int64)]] * len(GATHERED)
        return ExampleNumbers(*(np.concatenate(column) for column in columns))

    def digest_up_to(self, example: int) -> str:
        """A hash over the tokens and weights of all examples up to the end of the segment before place `example`."""
        self._read_up_to(example)
        return self._known[self._segment_of(example - 1)].digest if example else ""

    def token_ids(self, index: int) -> np.ndarray:
        """int32[L], a read-only view of the file."""
        corpus, row = self._place(index)
        return corpus.token_ids(row)

    def loss_weights(self, index: int) -> np.ndarray:
        """float32[L]."""
        corpus, row = self._place(index)
        return corpus.loss_weights(row)

    def example(self, index: int) -> TokenizedExample:
        """Example `index` as it was written."""
        corpus, row = self._place(index)
        return corpus.example(row)

    def verify(self, index: int) -> None:
        """Raise DataError when example `index` is not what was written."""
        corpus, row = self._place(index)
        corpus.verify(row)

    def source_of(self, indices: np.ndarray) -> np.ndarray:
        """Place in `sources` of each example of `indices`: int64[K]."""
        found = []
        for index in indices.tolist():
            number = self._segment_of(index)
            runs = self._known[number].sources
            ends = np.cumsum([rows for _, rows in runs])
            found.append(runs[int(np.searchsorted(ends, index - self._start_of(number), side="right"))][0])
        return np.array(found, np.int64)

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each example of `indices`: int32[K]."""
        places = [self._place(index) for index in indices.tolist()]
        return np.array([len(corpus.token_ids(row)) for corpus, row in places], np.int32)

    def loss_tokens_of(self, indices: np.ndarray) -> np.ndarray:
        """Targets of each example of `indices`: int32[K]."""
        return np.array([count_targets(self.loss_weights(index))[0] for index in indices.tolist()], np.int32)

    def report(self) -> dict[str, Any]:
        """The counts of everything that was read up to the newest segment seen here, as `PrepareReport.as_dict`."""
        state = read_state(self.folder, len(self._known) - 1) or {}
        report: dict[str, Any] = state["report"]
        return report

    def close(self) -> None:
        """End the writer, if it is this process's."""
        close = getattr(self._writer, "close", None)
        if close is not None:
            close()

    def _read_up_to(self, last: int) -> int:
        """Wait until `last` examples are there, or the stream has ended; how many of them there are."""
        while True:
            with self._lock:
                have, num_known = (self._known[-1].end if self._known else 0), len(self._known)
                if have < last:
                    have, num_known = self._learn(have, last)
            if self._writer is not None:
                self._writer.want(num_known + _SEGMENTS_AHEAD)
            if have >= last or read_end(self.folder) == num_known:
                return have
            self._wait(num_known)

    def _learn(self, have: int, last: int) -> tuple[int, int]:
        """Take note of the segments that are there, as far as `last` needs them."""
        while have < last and (state := read_state(self.folder, len(self._known))) is not None:
            have += state["rows"]
            runs = [(source, rows) for source, rows in state["runs"]]
            self._known.append(_Known(have, state["digest"], runs))
        return have, len(self._known)

    def _wait(self, number: int) -> None:
        """Until segment `number` or the end is there."""
        progress = self._progress()
        while not segment_folder(self.folder, number).exists() and read_end(self.folder) is None:
            if self._writer is not None:
                self._writer.check()
            time.sleep(_LOOK_SECONDS)
            before, progress = progress, self._progress()
            if before != progress and threading.current_thread() is threading.main_thread():
                self._alive(_records_of(progress) if self._writer is not None else 0)

    def _progress(self) -> bytes:
        try:
            return (self.folder / PROGRESS_FILE).read_bytes()
        except OSError:
            return b""

    def _segment_of(self, index: int) -> int:
        return bisect_right(self._known, index, key=lambda known: known.end)

    def _start_of(self, number: int) -> int:
        return self._known[number - 1].end if number else 0

    def _pieces(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(segment, first row, last row + 1) of each piece of a run of examples."""
        while first < end:
            number = self._segment_of(first)
            start, stop = self._start_of(number), min(end, self._known[number].end)
            yield number, first - start, stop - start
            first = stop

    def _gather(self, number: int, start: int, stop: int) -> list[np.ndarray]:
        corpus = self._corpus(number)
        return [corpus.column(name)[start:stop] for name in GATHERED]

    def _place(self, index: int) -> tuple[Corpus, int]:
        is_known = self._known and index < self._known[-1].end
        if index < 0 or not (is_known or index < self._read_up_to(index + 1)):
            raise IndexError(f"example {index} is outside the stream")
        number = self._segment_of(index)
        return self._corpus(number), index - self._start_of(number)

    def _map(self, number: int) -> Corpus:
        return Corpus(segment_folder(self.folder, number) / CORPUS)


AnyStore = TokenStore | StreamStore


class Lengths:
    """Tokens of examples, looked up by number; as an array, those of the first window."""

    def __init__(self, store: StreamStore) -> None:
        self._store = store

    def __getitem__(self, index: Any) -> Any:
        found = self._store.lengths_of(np.atleast_1d(np.asarray(index)))
        return found[0] if np.ndim(index) == 0 else found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._store.numbers(0, len(self._store)).lengths, dtype)


def _records_of(progress: bytes) -> int:
    """The last number of a progress file; 0 of one that is just written."""
    numbers = progress.split()
    return int(numbers[2]) if len(numbers) == 3 else 0


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: altered ({error}); delete its folder to read the stream again")
