"""Streamed sources into segments on disk, in a process of its own that stays ahead of training.

    writer = StreamWriter(job); writer.want(3); writer.check(); writer.close()      in the process that trains
    python -m sft_dist.data.stream_writer                                           what it starts

Sources take turns by weight, chunk by chunk, so that at any moment their shares of the records read are those of the
recipe. What was read is a function of the files and the recipe alone: not of how often reading was interrupted, who
read, or how many processes tokenised. Each segment carries where reading stood behind it; whoever goes on finds the
file, reads its first records again without tokenising them, and goes on with the next. A lock lets one process write at
a time. Bad records are counted, listed and limited as in a preparation, over everything read so far.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
import pyarrow as pa

from sft_dist.config.schema import SourceSection
from sft_dist.data.cache import only_one
from sft_dist.data.folder import atomic_folder, remove_unfinished
from sft_dist.data.report import PrepareReport, SourceReport
from sft_dist.data.shards import MOST_REJECTS, Chunk, bad_records, cut, placed
from sft_dist.data.sources import Pause, Record, Rejects, stream_file, stream_version
from sft_dist.data.store import CORPUS, Corpus, write_corpus
from sft_dist.data.stream_duplicates import Repetitions
from sft_dist.data.stream_plan import WINDOW_EXAMPLES
from sft_dist.data.stream_store import (
    END_FILE,
    PROGRESS_FILE,
    STATE_FILE,
    read_end,
    read_state,
    segment_folder,
)
from sft_dist.data.tokenise import Rules, Shard, tokenise
from sft_dist.data.workers import Workers
from sft_dist.errors import DataError, SftError

REJECTS_FILE, DROPPED_FILE = "rejects.jsonl", "dropped.jsonl"
_MAX_FILES = 100  # named in the report of a source
SEGMENT_RECORDS = 4 * WINDOW_EXAMPLES  # a segment ends here at the latest: sources of nothing but refuse end too


@dataclass(frozen=True, slots=True)
class StreamJob:
    """Everything a writer needs. `versions`: of the files of each source, when the stream was named."""

    folder: Path
    sources: tuple[SourceSection, ...]
    versions: tuple[dict[str, str], ...]
    rules: Rules
    on_bad_record: str
    max_bad_fraction: float
    num_workers: int
    segment_examples: int = WINDOW_EXAMPLES


@dataclass(frozen=True, slots=True)
class Place:
    """Where reading stands in one source, behind a chunk."""

    records: int = 0  # of the source, so far
    file: int = 0  # number of the file that is read
    record: int = 0  # good records of it that were read and came in a chunk
    line: int = 0  # of the last bad record of it that came in a chunk
    byte: int = 0
    format: str = ""  # of that file, once known
    done: bool = False


class StreamWriter:
    """The handle of a writer process, which starts when it is first needed and ends with this one."""

    def __init__(self, job: StreamJob) -> None:
        self._job, self._wanted = job, 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def want(self, num_segments: int) -> None:
        """Have so many segments made, in all. Starts the process unless they are there."""
        with self._lock:
            if num_segments <= self._wanted:
                return
            self._wanted = num_segments
            there = segment_folder(self._job.folder, num_segments - 1).exists()
            if self._process is None and not there and read_end(self._job.folder) is None:
                self._process = self._launch()
            if self._process is not None and self._process.poll() is None:
                self._tell(num_segments)

    def check(self) -> None:
        """Raise what ended the process, if it did not end in order."""
        with self._lock:
            if self._process is None or self._process.poll() in (None, 0):
                return
            try:
                raise pickle.load(self._process.stdout)  # type: ignore[arg-type]
            except EOFError:
                code = self._process.returncode
                raise DataError(
                    f"the process that reads the streamed sources died with exit code {code} (-9: often too little "
                    "memory); run again: what it has read stays"
                ) from None

    def close(self) -> None:
        """End the process, whatever it is at: an unfinished segment is made again."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def _launch(self) -> subprocess.Popen[bytes]:
        env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "sft_dist.data.stream_writer"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        for value in (sys.path, self._job):
            pickle.dump(value, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)  # type: ignore[arg-type]
        return process

    def _tell(self, num_segments: int) -> None:
        try:
            pickle.dump(num_segments, self._process.stdin)  # type: ignore[union-attr, arg-type]
            self._process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass  # it has just ended: `check` tells why


class Reading:
    """The sources from `places` on: chunks with where reading stands behind each."""

    def __init__(self, job: StreamJob, places: list[Place]) -> None:
        self._job, self._places = job, list(places)

    def chunks(self) -> Iterator[tuple[int, Chunk, Place]]:
        """(source, chunk, where its reading then stands), by turns, to the end of all sources."""
        sources = [self._of(number) for number in range(len(self._places))]
        while any(not place.done for place in self._places):
            number = min(
                (number for number, place in enumerate(self._places) if not place.done),
                key=lambda number: (self._places[number].records / self._job.sources[number].weight, number),
            )
            found = next(sources[number], None)
            if found is None:
                self._places[number] = replace(self._places[number], done=True)
                yield number, Chunk(self._job.sources[number], "", "", ""), self._places[number]
            else:
                chunk, self._places[number] = found
                yield number, chunk, self._places[number]

    def _of(self, number: int) -> Iterator[tuple[Chunk, Place]]:
        source, place = self._job.sources[number], self._places[number]
        total = place.records
        for at, (file, version) in enumerate(self._job.versions[number].items()):
            if at < place.file:
                continue
            if stream_version(file, source) != version:
                raise DataError(f"{file}: changed while it was streamed; start the run again in another run.dir")
            begun = place if at == place.file else Place()
            last_bad = (begun.line, begun.byte)
            rejects = Rejects(self._job.on_bad_record, MOST_REJECTS, last_bad)  # type: ignore[arg-type]
            records = _Counted(stream_file(file, source, rejects), begun.record)
            for chunk in cut(source, records, {file: begun.format}, rejects):
                total += len(chunk.records) + len(chunk.bad)
                last_bad = max([last_bad, *((bad.line, bad.byte) for bad in chunk.bad)])
                yield chunk, Place(total, at, records.count - chunk.num_held, *last_bad, chunk.format)


class _Counted:
    """Records behind the first `skip` good ones, which were read before; `count` of those read in all.

    Bad ones among the first were taken before too: no pause stands there.
    """

    def __init__(self, records: Iterator[Record], skip: int) -> None:
        self._records, self._skip, self.count = records, skip, skip

    def __iter__(self) -> Iterator[Record]:
        for record in islice(self._records, self._skip, None):
            self.count += not isinstance(record, Pause)
            yield record


def tokenised(rules: Rules, chunk: Chunk) -> Shard:
    """What workers do. The rules come to them once: a tokenizer takes as long to read as a chunk to tokenise."""
    return tokenise(enumerate(chunk.records), chunk.source, chunk.format, rules)


class Segments:
    """The segments of a job, one after another, from wherever its folder stands."""

    def __init__(self, job: StreamJob, workers: Workers) -> None:
        self._job, self._workers = job, workers
        self._next: int | None = None  # the segment that `_shards` goes on with
        self._num_chunks = self._num_records = 0

    def make(self) -> int:
        """Make the segment behind those that are there; how many there are then, 0 when the sources are used up."""
        with only_one(self._job.folder / "lock", lambda: None):
            if read_end(self._job.folder) is not None:
                return 0
            number = self._count()
            if number != self._next:  # new here, or somebody else wrote meanwhile
                remove_unfinished(segment_folder(self._job.folder, number))
                self._begin(number)
            return self._write(number)

    def _count(self) -> int:
        number = self._next or 0
        while segment_folder(self._job.folder, number).exists():
            number += 1
        return number

    def _begin(self, number: int) -> None:
        """Go on where segment `number - 1` ended."""
        state = read_state(self._job.folder, number - 1) if number else None
        if state is None:
            self._places = [Place() for _ in self._job.sources]
            self._digest, self._total = hashlib.sha256(self._job.folder.name.encode()).hexdigest(), 0
            self._report = PrepareReport(self._job.rules.template.name, self._job.rules.seq_len)
            self._report.sources = [SourceReport(s.path, "sources", weight=s.weight) for s in self._job.sources]
        else:
            self._places = [Place(**place) for place in state["places"]]
            self._digest, self._total = state["digest"], state["total"]
            self._report = PrepareReport.from_dict(state["report"])
        self._repetitions = Repetitions(self._job.folder, number)
        tasks = ((found, found[1] if found[1].records else None) for found in Reading(self._job, self._places).chunks())
        self._shards = self._workers.map(tasks)

    def _write(self, number: int) -> int:
        folder, files = segment_folder(self._job.folder, number), dict[str, int]()
        runs: list[list[int]] = []
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_folder(folder))
            rejects, dropped = (
                stack.enter_context(open(temporary / name, "w", encoding="utf-8"))
                for name in (REJECTS_FILE, DROPPED_FILE)
            )
            write_corpus(temporary / CORPUS, self._tables(files, runs, rejects, dropped), files)
            self._report.check_bad_fraction(self._job.max_bad_fraction)
            corpus = Corpus(temporary / CORPUS)
            digests = corpus.column("digest").astype("<u8").tobytes()
            self._digest = hashlib.sha256(self._digest.encode() + digests).hexdigest()
            self._total += len(corpus)
            self._count_duplicates(corpus, runs)
            state = {
                "rows": len(corpus),
                "total": self._total,
                "digest": self._digest,
                "runs": runs,
                "places": [asdict(place) for place in self._places],
                "report": self._report.as_dict(),
            }
            (temporary / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
        self._next = number + 1
        if all(place.done for place in self._places):
            self._end(number + 1)
            return 0
        return number + 1

    def _tables(
        self, files: dict[str, int], runs: list[list[int]], rejects: IO[str], dropped: IO[str]
    ) -> Iterator[pa.Table]:
        """The rows of the next chunks, enough for a segment."""
        rows = records = 0
        while rows < self._job.segment_examples and records < SEGMENT_RECORDS:
            found, shard = next(self._shards, (None, None))
            if found is None:
                return
            number, chunk, self._places[number] = found
            shard = shard or tokenise((), chunk.source, chunk.format, self._job.rules)
            self._count_chunk(number, chunk, shard, rejects, dropped)
            rows, records = rows + len(shard.table), records + len(chunk.records) + len(chunk.bad)
            runs.append([number, len(shard.table)])
            yield placed(chunk, shard, files)

    def _count_chunk(self, number: int, chunk: Chunk, shard: Shard, rejects: IO[str], dropped: IO[str]) -> None:
        counts = self._report.sources[number]
        bad = bad_records(chunk, shard)
        if bad and self._job.on_bad_record == "stop":
            raise bad[0]
        for one in bad:
            self._report.reject(one, counts, rejects)
        for event in shard.events:
            self._report.count(event, chunk.records[event.record], counts, dropped)
        counts.add(chunk, shard)
        del counts.files[_MAX_FILES:]
        self._num_chunks += 1
        self._num_records += len(chunk.records) + len(chunk.bad)
        progress = f"{os.getpid()} {self._num_chunks} {self._num_records}"
        (self._job.folder / PROGRESS_FILE).write_text(progress)

    def _count_duplicates(self, corpus: Corpus, runs: list[list[int]]) -> None:
        """`runs`: (source, rows) one after another."""
        counts = self._report.sources
        sources, rows = np.array(runs, np.int64).reshape(-1, 2).T
        repeated = self._repetitions.count(corpus.column("content"), np.repeat(sources, rows), len(counts))
        for source, number in zip(counts, repeated.tolist(), strict=True):
            source.repeated += number

    def _end(self, num_segments: int) -> None:
        temporary = self._job.folder / f"{END_FILE}.{os.getpid()}"
        temporary.write_text(json.dumps({"segments": num_segments, "examples": self._total}))
        os.replace(temporary, self._job.folder / END_FILE)


def serve(requests: BinaryIO, replies: BinaryIO) -> int:
    """A writer's life: the job first, then how many segments are wanted, until the sources end."""
    sys.path[:] = pickle.load(requests)
    job: StreamJob = pickle.load(requests)
    wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, wanted), daemon=True).start()
    try:
        with Workers(partial(tokenised, job.rules), job.num_workers) as workers:
            segments, there = Segments(job, workers), 0
            while True:
                number = wanted.get()
                while there < number:
                    there = segments.make()
                    if not there:
                        return 0
    except SftError as error:
        pickle.dump(error, replies)
        replies.flush()
        return 1


def _listen(requests: BinaryIO, wanted: queue.SimpleQueue[int]) -> None:
    """Pass on what is asked for; the end of the pipe is the end of who asks, and of this process."""
    while True:
        try:
            wanted.put(pickle.load(requests))
        except (EOFError, pickle.UnpicklingError):
            os._exit(0)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not get between the answers
    os._exit(serve(sys.stdin.buffer, answers))  # a thread waits at the pipe: Python would complain of it at its end
