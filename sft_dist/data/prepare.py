"""From the recipe's sources to token stores, once: everything that every rank then only reads.

    prepared = prepare(recipe, tokenizer, notice=print)
    prepared.train.lengths, prepared.eval, prepared.template, prepared.report

    source files --chunks--> shards (cached by content) --merge--> corpus --split, weigh--> train, eval, test

Called by every rank before any process group exists: whoever comes first prepares, the others wait at a file lock and
map the same files. A second run with the same inputs reads the cache; one whose files changed a little tokenises what
changed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sft_dist.config.schema import Recipe, SourceSection
from sft_dist.data.cache import cache_name, cache_root, file_digest, only_one, rules_digest
from sft_dist.data.folder import atomic_folder, remove_unfinished
from sft_dist.data.permutation import derive_key, permute
from sft_dist.data.report import PrepareReport, SourceReport, SplitReport
from sft_dist.data.shards import Chunk, ShardCache, chunks
from sft_dist.data.sources import Rejects, source_files
from sft_dist.data.splits import EVAL, TEST, TRAIN, draw_splits
from sft_dist.data.store import CORPUS, Corpus, TokenStore, open_store, with_places, write_corpus, write_split
from sft_dist.data.templates import ChatTemplate, resolve_template
from sft_dist.data.tokenise import Event, Rules, Shard
from sft_dist.data.workers import Workers
from sft_dist.errors import BadRecord, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLITS = {"train": TRAIN, "eval": EVAL, "test": TEST}
ROLES = {"sources": None, "eval_sources": EVAL, "test_sources": TEST}  # key of the recipe -> split it is given to
REPORT_FILE, REJECTS_FILE, DROPPED_FILE = "report.json", "rejects.jsonl", "dropped.jsonl"
SHARDS = "shards"
BYTES_PER_WORKER = 16 << 20  # of source files: less is tokenised before another process has started

Notice = Callable[[str], None]
Progress = Callable[[int, int], None]  # bytes of source files read so far, bytes in all


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What training reads. A split without examples is None; `train` always has some."""

    train: TokenStore
    eval: TokenStore | None
    test: TokenStore | None
    template: ChatTemplate
    report: PrepareReport
    folder: Path  # the cache entry


def prepare(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, notice: Notice, progress: Progress = lambda done, total: None
) -> PreparedData:
    """Tokenise the recipe's sources into stores, or find them in the cache.

    `notice` gets one line of text at a time. Raises ConfigError (no template), BadRecord (on_bad_record: stop),
    DataError (nothing trainable, or too many bad records) and StorageError.
    """
    template = resolve_template(recipe.data.chat_template, tokenizer)
    files = {str(path) for role in ROLES for source in getattr(recipe.data, role) for path in source_files(source.path)}
    digests = {path: file_digest(path) for path in sorted(files)}
    folder = cache_root(recipe) / cache_name(recipe, tokenizer, template.text, digests)
    prepared = _find(folder, template)
    if prepared is None:
        waiting = f"another process is preparing this data; waiting for it ({folder})"
        with only_one(folder.with_suffix(".lock"), lambda: notice(waiting)):
            prepared = _find(folder, template) or _make(
                folder, recipe, tokenizer, template, notice, _Meter(files, progress)
            )
    for line in prepared.report.lines():
        notice(line)
    return prepared


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
    with atomic_folder(folder) as temporary:
        _Preparation(recipe, tokenizer, template, meter, temporary).write()
    return _read(folder, template)


def _find(folder: Path, template: ChatTemplate) -> PreparedData | None:
    """The entry `folder`; None when it is not there or not whole."""
    try:
        return _read(folder, template) if folder.exists() else None
    except (DataError, OSError, ValueError, LookupError, TypeError):
        return None


def _read(folder: Path, template: ChatTemplate) -> PreparedData:
    report = PrepareReport.read(folder / REPORT_FILE)
    stores = {name: open_store(folder / name) for name in report.splits}
    return PreparedData(stores["train"], stores.get("eval"), stores.get("test"), template, report, folder)


def num_copies(num_rows: int, weight: float | Fraction, key: int) -> np.ndarray:
    """How often each row of a source comes per epoch: int64[num_rows], in sum `num_rows * weight` rounded half up.

    An exact integer schedule: every row floor(weight) times, and a share of them, chosen by `key`, once more.
    """
    exact = Fraction(str(weight))
    whole, part = divmod(exact, 1)
    extra = (2 * part.numerator * num_rows + part.denominator) // (2 * part.denominator)
    rank = permute(np.arange(num_rows), num_rows, key) if extra else np.arange(num_rows)
    return int(whole) + (rank < extra).astype(np.int64)


def temperate(weights: list[float], sizes: list[int], temperature: float) -> list[Fraction]:
    """Copies per row of each source so that its share of the mix is its weighted size to the power 1 / temperature.

    1 leaves the weights as they are, larger ones raise small sources (Raffel et al., 2020, section 3.5.2; Devlin,
    2019). The mix keeps its total of weighted rows. Sources without rows get 0.
    """
    mass = [weight * size for weight, size in zip(weights, sizes, strict=True)]
    if temperature == 1.0:
        return [Fraction(str(weight)) for weight in weights]
    heat = [m ** (1 / temperature) for m in mass]
    wanted = [sum(mass) * h / max(sum(heat), 1e-300) for h in heat]
    copies = (w / size if size else 0.0 for w, size in zip(wanted, sizes, strict=True))
    return [Fraction(c).limit_denominator(10**6) for c in copies]


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where rows [first, last) of the corpus come from."""

    role: str
    source: SourceSection
    first: int
    last: int


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
        self._report = PrepareReport(template.name, data.seq_len)
        rules = Rules(tokenizer, template, data.loss_on, data.prompt_loss_weight, data.seq_len, data.long_examples)
        self._cache = ShardCache(cache_root(recipe) / SHARDS, rules, rules_digest(recipe, tokenizer, template.text))
        self._rejects = Rejects(data.on_bad_record, data.max_bad_fraction)
        self._origins: list[_Origin] = []
        self._num_rows = 0

    def write(self) -> None:
        """Fill the folder with the corpus, one store per split, the report and the lists of what was not used."""
        started = time.monotonic()
        files: dict[str, int] = {}
        with (
            open(self._folder / REJECTS_FILE, "w", encoding="utf-8") as rejects,
            open(self._folder / DROPPED_FILE, "w", encoding="utf-8") as dropped,
        ):
            write_corpus(self._folder / CORPUS, self._tables(files, rejects, dropped), files)
        self._report.check_bad_fraction(self._recipe.data.max_bad_fraction)
        corpus = Corpus(self._folder / CORPUS)
        for name, rows in self._routes(corpus).items():
            if len(rows):
                write_split(self._folder / name, corpus, rows, {"split": name} | self._sources())
                self._report.splits[name] = SplitReport.of(open_store(self._folder / name))
        self._report.seconds = time.monotonic() - started
        self._report.write(self._folder / REPORT_FILE)

    def _tables(self, files: dict[str, int], rejects: IO[str], dropped: IO[str]) -> Iterator[pa.Table]:
        """The rows of all sources, counted in the report. Shards that are missing are made on the way."""
        with Workers(self._cache.make, self._num_workers()) as workers:
            for role in ROLES:
                for source in getattr(self._recipe.data, role):
                    counts, first = SourceReport(source.path, role, weight=source.weight), self._num_rows
                    self._report.sources.append(counts)
                    tasks = ((chunk, self._cache.task(chunk)) for chunk in chunks(source, self._rejects))
                    for chunk, _ in workers.map(tasks):
                        yield self._merge(chunk, counts, files, rejects, dropped)
                    self._origins.append(_Origin(role, source, first, self._num_rows))

    def _merge(
        self, chunk: Chunk, counts: SourceReport, files: dict[str, int], rejects: IO[str], dropped: IO[str]
    ) -> pa.Table:
        """The rows of `chunk` with their places."""
        shard = self._cache.shard(chunk)
        bad = sorted([*chunk.bad, *_rejected(chunk, shard)], key=lambda one: (one.line, one.byte))
        if bad and self._recipe.data.on_bad_record == "stop":
            raise bad[0]
        for one in bad:
            self._report.reject(one, counts, rejects)
        for event in shard.events:
            self._report.count(event, chunk.records[event.record].id + event.part, counts, dropped)
        counts.add(chunk, shard)
        if chunk.records:
            self._meter(chunk.file, chunk.records[-1].byte)
        self._num_rows += len(shard.table)
        suffixes = [record.id.removeprefix(record.file) for record in chunk.records]
        owners, parts = shard.table["record"].to_pylist(), shard.table["part"].to_pylist()
        places = [suffixes[owner] + part for owner, part in zip(owners, parts, strict=True)]
        source = files.setdefault(chunk.file, len(files))
        return with_places(shard.table.drop_columns(["record", "part"]), [source] * len(places), places)

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

    def _routes(self, corpus: Corpus) -> dict[str, np.ndarray]:
        """Split -> rows it holds, repeated as often as the mix says."""
        contents = corpus.column("content")
        split_of = self._split_of_rows(contents)
        self._count_duplicates(contents)
        copies = self._copies()
        routes = {
            name: np.repeat(np.flatnonzero(split_of == split), copies[split_of == split])
            for name, split in SPLITS.items()
        }
        if not len(routes["train"]):
            raise DataError(self._nothing_to_train())
        self._note_overlap(contents, split_of)
        return routes

    def _split_of_rows(self, contents: np.ndarray) -> np.ndarray:
        """The split of each row: int8[N]."""
        data, seed = self._recipe.data, self._recipe.run.seed
        given = np.full(len(contents), -1, dtype=np.int8)
        sources = np.zeros(len(contents), dtype=np.int32)
        for number, origin in enumerate(self._origins):
            sources[origin.first : origin.last] = number
            split = ROLES[origin.role]
            given[origin.first : origin.last] = -1 if split is None else split
        drawn = given < 0
        given[drawn] = draw_splits(contents[drawn], sources[drawn], data.eval_fraction, data.test_fraction, seed)
        if data.eval_fraction and EVAL not in given and drawn.any():
            self._report.notices.append("fewer than 2 different examples: no validation split")
        return given

    def _count_duplicates(self, contents: np.ndarray) -> None:
        """Rows of each source whose content came before, in it or in an earlier source."""
        is_first = np.zeros(len(contents), dtype=bool)
        is_first[np.unique(contents, return_index=True)[1]] = True
        for origin, counts in zip(self._origins, self._report.sources, strict=True):
            counts.duplicates = int(np.count_nonzero(~is_first[origin.first : origin.last]))

    def _copies(self) -> np.ndarray:
        """How often each row of the corpus comes per epoch: int64[N]."""
        data, seed = self._recipe.data, self._recipe.run.seed
        mixed = [origin for origin in self._origins if origin.role == "sources"]
        weights = temperate(
            [o.source.weight for o in mixed], [o.last - o.first for o in mixed], data.mixture_temperature
        )
        weights += [Fraction(str(o.source.weight)) for o in self._origins if o.role != "sources"]
        copies = [np.zeros(0, dtype=np.int64)]
        for number, (origin, weight) in enumerate(zip(self._origins, weights, strict=True)):
            copies.append(num_copies(origin.last - origin.first, weight, derive_key("copies", seed, number)))
            self._report.sources[number].copies = float(weight)
        return np.concatenate(copies)

    def _note_overlap(self, contents: np.ndarray, split_of: np.ndarray) -> None:
        """Given evaluation sets may repeat what is trained on; drawn ones cannot."""
        trained = np.unique(contents[split_of == TRAIN])
        for name in ("eval", "test"):
            held_out = np.unique(contents[split_of == SPLITS[name]])
            if shared := int(np.isin(held_out, trained).sum()):
                self._report.notices.append(
                    f"warning: {shared:,} of {len(held_out):,} {name} examples are in train too"
                )

    def _nothing_to_train(self) -> str:
        counts = [source for source in self._report.sources if source.role == "sources"]
        total = {
            name: sum(getattr(c, name) for c in counts) for name in ("records", "rejected", "too_long", "no_target")
        }
        if not total["records"]:
            return f"data.sources: 0 records in {', '.join(c.path for c in counts)}: the files are empty"
        return (
            f"data.sources: 0 trainable examples of {total['records']:,} records ({total['too_long']:,} longer than "
            f"data.seq_len={self._recipe.data.seq_len}, {total['no_target']:,} without a supervised token, "
            f"{total['rejected']:,} bad); raise data.seq_len, set data.long_examples=truncate or check data.loss_on"
        )


def _rejected(chunk: Chunk, shard: Shard) -> list[BadRecord]:
    """What was found wrong behind the reading, at its place."""
    found: Iterable[Event] = (event for event in shard.events if event.kind == "rejected")
    return [chunk.records[event.record].bad(event.reason) for event in found]


class _Meter:
    """Turns the place of a record into bytes read of all bytes."""

    def __init__(self, files: Iterable[str], progress: Progress) -> None:
        self._sizes = {path: _text_bytes(Path(path)) for path in files}
        self.total = sum(self._sizes.values())
        self._progress = progress
        self._done, self._file = 0, ""

    def __call__(self, file: str, byte: int) -> None:
        if file != self._file:
            self._done += self._sizes.get(self._file, 0)
            self._file = file
        self._progress(min(self._done + byte, self.total), self.total)


def _text_bytes(path: Path) -> int:
    """Size of a file, unpacked: gzip keeps it, modulo 4 GiB, in its last four bytes (RFC 1952)."""
    size = path.stat().st_size
    if path.suffix != ".gz" or size < 4:
        return size
    with open(path, "rb") as file:
        file.seek(-4, 2)
        return int.from_bytes(file.read(4), "little")
