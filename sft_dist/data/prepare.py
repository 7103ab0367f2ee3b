"""From the recipe's sources to token stores, once: everything that every rank then only reads.

    prepared = prepare(recipe, tokenizer, notice=print)
    prepared.train.lengths, prepared.eval, prepared.template, prepared.report

    source files --chunks--> shards (cached by content) --merge--> corpus --split, weigh--> train, eval, test

Called by every rank before any process group exists: whoever comes first prepares, the others wait at a file lock and
map the same files. A second run with the same inputs reads the cache; one whose files changed a little tokenises what
changed.
"""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sft_dist.config.schema import DataSection, Recipe, SourceSection
from sft_dist.data.bos import bos_notices
from sft_dist.data.cache import cache_name, cache_root, only_one, rules_digest
from sft_dist.data.coverage import language_of
from sft_dist.data.exchanges import text_of
from sft_dist.data.files import file_digest
from sft_dist.data.filters import ScoreColumn
from sft_dist.data.folder import atomic_folder, remove_forgotten, remove_unfinished
from sft_dist.data.permutation import derive_key
from sft_dist.data.plain_tokenizer import PlainTokenizer
from sft_dist.data.report import LANGUAGE_ROWS, PrepareReport, SourceReport, SplitReport
from sft_dist.data.selection import ROLES, Origin, Said, select
from sft_dist.data.shards import MOST_REJECTS, Chunk, ShardCache, bad_records, chunks, placed
from sft_dist.data.sources import Rejects, pin_notices, source_digests, source_sizes
from sft_dist.data.store import CORPUS, Corpus, TokenStore, open_store, write_corpus, write_split
from sft_dist.data.stream_duplicates import overlap_notice
from sft_dist.data.stream_store import StreamStore
from sft_dist.data.streams import open_stream
from sft_dist.data.survey import sampled_rows
from sft_dist.data.templates import ChatTemplate, resolve_template
from sft_dist.data.tokenise import Rules
from sft_dist.data.workers import Workers
from sft_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPORT_FILE, REJECTS_FILE, DROPPED_FILE = "report.json", "rejects.jsonl", "dropped.jsonl"
SHARDS = "shards"
BYTES_PER_WORKER = 16 << 20  # of source files: less is tokenised before another process has started

Notice = Callable[[str], None]
Progress = Callable[[int, int], None]  # bytes of source files read so far, bytes in all
Alive = Callable[[], None]
Streaming = Callable[[int], None]  # records of streamed sources read so far, while they are waited for


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What training reads. A split without examples is None; `train` always has some."""

    indexed: TokenStore | None
    eval: TokenStore | None
    test: TokenStore | None
    template: ChatTemplate
    report: PrepareReport
    folder: Path  # the cache entry
    is_new: bool = False  # made since this process first looked, whoever made it
    stream: StreamStore | None = None

    @property
    def train(self) -> TokenStore | StreamStore:
        """The examples to train on: all of them, or a stream of them."""
        store = self.stream if self.stream is not None else self.indexed
        assert store is not None
        return store

    def report_now(self) -> PrepareReport:
        """The report, with the counts of what has been read of a stream so far."""
        if self.stream is None:
            return self.report
        report = self.report.behind(PrepareReport.from_dict(self.stream.report()))
        for name, store in (("eval", self.eval), ("test", self.test)):
            if store is not None:
                contents = store.corpus.column("content")[store.rows]
                report.notices.append(overlap_notice(self.stream.folder, name, contents))
        return report

    def close(self) -> None:
        """End what reads ahead."""
        if self.stream is not None:
            self.stream.close()


def prepare(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    notice: Notice,
    progress: Progress = lambda done, total: None,
    streaming: Streaming = lambda records: None,
    alive: Alive = lambda: None,
    counts: Notice | None = None,
    reads_streams: bool = True,
) -> PreparedData:
    """Tokenise the recipe's sources into stores, or find them in the cache. Of streamed sources the first window.

    `notice` gets one line of text at a time; those of the report go to `counts` where that is given. `alive` is called
    while the work goes on without a byte being read: here, or in the process that is waited for. `reads_streams`:
    another process of this machine does where it is False.
    Raises ConfigError (no template), BadRecord (on_bad_record: stop),
    DataError (nothing trainable, or too many bad records) and StorageError.
    """
    template = resolve_template(recipe.data.chat_template, tokenizer)
    sources = [source for role in ROLES for source in indexed(recipe.data, role)]
    digests = {name: digest for source in sources for name, digest in source_digests(source).items()}
    digests |= {source.template: file_digest(source.template) for source in sources if source.template}
    folder = cache_root(recipe) / cache_name(recipe, tokenizer, template.text, digests)
    prepared = _find(folder, template)
    if prepared is None:
        waiting = f"another process is preparing this data; waiting for it ({folder})"
        with only_one(folder.with_suffix(".lock"), lambda: notice(waiting), alive) as goes_on:
            meter = _Meter(sources, progress, alive, goes_on)
            found = _find(folder, template) or _make(folder, recipe, tokenizer, template, notice, meter)
            prepared = replace(found, is_new=True)
    if recipe.data.streams:
        rules = rules_of(recipe, tokenizer, template)
        stream = open_stream(recipe, rules, rules_digest(recipe, tokenizer, template.text), streaming, reads_streams)
        prepared = replace(prepared, stream=stream, is_new=stream.is_new)
    told = [*pin_notices(sources), *bos_notices(template.text, tokenizer)]
    told += [*template.prompt_notices(tokenizer), *template.stop_notices(tokenizer)]
    for line in prepared.report_now().lines():
        (counts or notice)(line)
    for line in told:
        notice(line)
    return prepared


def indexed(data: DataSection, role: str) -> list[SourceSection]:
    """The sources of a key of the recipe that are prepared whole."""
    return [source for source in getattr(data, role) if not source.streaming]


def rules_of(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> Rules:
    """What decides the rows of the recipe's records."""
    data = recipe.data
    return Rules(
        tokenizer=PlainTokenizer.of(tokenizer),
        template=template,
        loss_on=data.loss_on,
        prompt_loss_weight=data.prompt_loss_weight,
        seq_len=data.seq_len,
        long_examples=data.long_examples,
        score=data.filters.score,
    )


def _make(
    folder: Path,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    notice: Notice,
    meter: _Meter,
) -> PreparedData:
    """Prepare into `folder`, holding its lock; what stands there is damaged."""
    if folder.exists():
        notice(f"cache entry {folder} is damaged: preparing the data again")
        shutil.rmtree(folder)
    remove_unfinished(folder)
    remove_forgotten(cache_root(recipe) / SHARDS)
    with atomic_folder(folder) as temporary, _libraries_left_alone():
        _Preparation(recipe, tokenizer, template, meter, temporary).write()
    return _read(folder, template)


@contextmanager
def _libraries_left_alone() -> Iterator[None]:
    """The garbage collector goes through what is made from here on, not again and again through all that torch and
    transformers hold. What somebody else has frozen stays frozen."""
    is_ours = gc.get_freeze_count() == 0
    gc.freeze()
    try:
        yield
    finally:
        if is_ours:
            gc.unfreeze()


def _find(folder: Path, template: ChatTemplate) -> PreparedData | None:
    """The entry `folder`; None when it is not there or not whole."""
    try:
        return _read(folder, template) if folder.exists() else None
    except (DataError, OSError, ValueError, LookupError, TypeError):
        return None


def _read(folder: Path, template: ChatTemplate) -> PreparedData:
    report = PrepareReport.read(folder / REPORT_FILE)
    stores = {name: open_store(folder / name) for name in report.splits}
    return PreparedData(stores.get("train"), stores.get("eval"), stores.get("test"), template, report, folder)


class _Preparation:
    """One preparation, from files to a finished folder."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        template: ChatTemplate,
        meter: _Meter,
        folder: Path,
    ) -> None:
        data = recipe.data
        self._recipe, self._meter, self._folder = recipe, meter, folder
        self._tokenizer, self._template = tokenizer, template
        self._report = PrepareReport(template.name, data.seq_len)
        rules = rules_of(recipe, tokenizer, template)
        self._cache = ShardCache(cache_root(recipe) / SHARDS, rules, rules_digest(recipe, tokenizer, template.text))
        self._rejects = Rejects(data.on_bad_record, MOST_REJECTS)
        self._score_column = ScoreColumn(rules.score) if rules.score else None
        self._origins: list[Origin] = []
        self._num_rows = 0

    def write(self) -> None:
        """Fill the folder with the corpus, one store per split, the report and the lists of what was not used."""
        started = time.monotonic()
        model = threading.Thread(target=language_of, args=("",), name="sft-languages", daemon=True)
        model.start()  # it takes half a second to read: meanwhile rows are made
        files: dict[str, int] = {}
        with (
            open(self._folder / REJECTS_FILE, "w", encoding="utf-8") as rejects,
            open(self._folder / DROPPED_FILE, "w", encoding="utf-8") as dropped,
        ):
            write_corpus(self._folder / CORPUS, self._tables(files, rejects, dropped), files)
        self._report.check_bad_fraction(self._recipe.data.max_bad_fraction)
        corpus = Corpus(self._folder / CORPUS)
        with open(self._folder / DROPPED_FILE, "a", encoding="utf-8") as dropped:
            said = Said(corpus, self._template, self._tokenizer, self._meter.stay)
            routes = self._routes(corpus, said, dropped)
        model.join()
        for name, rows in routes.items():
            if len(rows):
                write_split(self._folder / name, corpus, rows, {"split": name} | self._sources())
                store = open_store(self._folder / name)
                self._report.splits[name] = SplitReport.of(store, self._languages(store, said))
        self._report.seconds = time.monotonic() - started
        self._report.write(self._folder / REPORT_FILE)

    def _tables(self, files: dict[str, int], rejects: IO[str], dropped: IO[str]) -> Iterator[pa.Table]:
        """The rows of all sources, counted in the report. Shards that are missing are made on the way."""
        with Workers(self._cache.make, self._num_workers(), self._cache.expect_many) as workers:
            for role in ROLES:
                for source in indexed(self._recipe.data, role):
                    counts, first = SourceReport(source.path, role, weight=source.weight), self._num_rows
                    self._report.sources.append(counts)
                    found = chunks(source, self._rejects, is_trained=role == "sources")
                    for chunk, _ in workers.map((chunk, self._cache.task(chunk)) for chunk in found):
                        yield self._merge(chunk, counts, files, rejects, dropped)
                    self._origins.append(Origin(role, source, first, self._num_rows))

    def _merge(
        self, chunk: Chunk, counts: SourceReport, files: dict[str, int], rejects: IO[str], dropped: IO[str]
    ) -> pa.Table:
        """The rows of `chunk` with their places."""
        shard = self._cache.shard(chunk)
        bad = bad_records(chunk, shard)
        if bad and self._recipe.data.on_bad_record == "stop":
            raise bad[0].stopping()
        for one in bad:
            self._report.reject(one, counts, rejects)
        for event in shard.events:
            self._report.count(event, chunk.records[event.record], counts, dropped)
        counts.add(chunk, shard)
        if self._score_column and chunk.is_trained:
            self._score_column.look(chunk.source.path, (record.value for record in chunk.records))
        if chunk.records:
            self._meter(chunk.file, chunk.records[-1].byte)
        self._num_rows += len(shard.table)
        return placed(chunk, shard, files)

    def _sources(self) -> dict[str, list[Any]]:
        """Names of the sources, told apart where a path comes twice, and where their rows end."""
        paths = [origin.source.path for origin in self._origins]
        names = [f"{path} ({n})" if paths.count(path) > 1 else path for n, path in enumerate(paths, 1)]
        return {"sources": names, "source_ends": [origin.last for origin in self._origins]}

    def _num_workers(self) -> int:
        """0 on small data or one core: the other processes would start after the work is done."""
        if self._recipe.data.workers != "auto":
            return self._recipe.data.workers
        wanted = min(len(os.sched_getaffinity(0)), self._meter.total // BYTES_PER_WORKER)
        return wanted if wanted > 1 else 0

    def _languages(self, store: TokenStore, said: Said) -> dict[str, int]:
        """Language -> rows, of a seeded sample of a split."""
        chosen = sampled_rows(store, LANGUAGE_ROWS, derive_key("languages", self._recipe.run.seed))
        texts = map(text_of, said.of(store.rows[chosen].tolist()))
        return dict(Counter(map(language_of, texts)).most_common())

    def _routes(self, corpus: Corpus, said: Said, dropped: IO[str]) -> dict[str, np.ndarray]:
        """Split -> rows it holds; what is left out is counted and listed."""
        found = select(corpus, self._origins, self._recipe.data, said, self._recipe.run.seed)
        ends = [origin.last for origin in self._origins]
        for drop in found.left_out:
            counts = self._report.sources[bisect_right(ends, drop.row)]
            like = f" {corpus.example(drop.like).id}" if drop.like is not None else ""
            self._report.leave_out(corpus.example(drop.row).id, drop.kind, drop.reason + like, counts, dropped)
        for counts, copies, repeated in zip(self._report.sources, found.copies, found.repeated, strict=True):
            counts.copies, counts.repeated = copies, repeated
        self._report.notices += [*self._score_notices(), *found.notices]
        if not len(found.rows["train"]) and indexed(self._recipe.data, "sources"):
            raise DataError("; ".join([self._report.nothing_to_train(), *self._score_notices()]))
        return found.rows

    def _score_notices(self) -> Iterator[str]:
        return self._score_column.notices() if self._score_column else iter(())


class _Meter:
    """Turns the place of a record into bytes read of all bytes."""

    def __init__(self, sources: Iterable[SourceSection], progress: Progress, alive: Alive, goes_on: Alive) -> None:
        """`goes_on` tells the processes that wait for this one."""
        self._sizes = {name: size for source in sources for name, size in source_sizes(source).items()}
        self.total = sum(self._sizes.values())
        self._progress, self._alive, self._goes_on = progress, alive, goes_on
        self._done, self._file = 0, ""

    def __call__(self, file: str, byte: int) -> None:
        if file != self._file:
            self._done += self._sizes.get(self._file, 0)
            self._file = file
        self._goes_on()
        self._progress(min(self._done + byte, self.total), self.total)

    def stay(self) -> None:
        """All is read, and its rows are looked at."""
        self._goes_on()
        self._alive()
