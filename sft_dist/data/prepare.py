"""From the recipe's sources to token stores, once: everything that every rank then only reads.

    prepared = prepare(recipe, tokenizer, notice=print)
    prepared.train.lengths, prepared.eval, prepared.template, prepared.report

    source files --stage--> one store of all rows --split, weigh--> train, eval, test --commit--> cache/<name>/

Called by every rank before any process group exists: whoever comes first prepares, the others wait at a file lock and
map the same files. A second run with the same inputs reads the cache.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sft_dist.config.schema import Recipe, SourceSection
from sft_dist.data.cache import cache_name, cache_root, file_digest, only_one
from sft_dist.data.folder import atomic_folder, remove_unfinished
from sft_dist.data.permutation import derive_key, permute
from sft_dist.data.report import PrepareReport, SourceReport, SplitReport
from sft_dist.data.sources import Record, source_files
from sft_dist.data.splits import split_keys
from sft_dist.data.staging import Stager
from sft_dist.data.store import TokenStore, open_store, write_store
from sft_dist.data.templates import ChatTemplate, resolve_template
from sft_dist.errors import DataError
from sft_dist.types import TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "eval", "test")
ROLES = ("sources", "eval_sources", "test_sources")
REPORT_FILE = "report.json"

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
        _Preparation(recipe, tokenizer, template, meter).write(temporary)
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


def num_copies(num_rows: int, weight: float, key: int) -> np.ndarray:
    """How often each row of a source comes per epoch: int64[num_rows], in sum `num_rows * weight` rounded half up.

    An exact integer schedule: every row floor(weight) times, and a share of them, chosen by `key`, once more.
    """
    exact = Fraction(str(weight))
    numerator, denominator = exact.numerator, exact.denominator
    places = [(2 * numerator * rank + denominator) // (2 * denominator) for rank in range(num_rows + 1)]
    return np.diff(places)[permute(np.arange(num_rows), num_rows, key)]


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where rows [first, last) of the staged store come from."""

    role: str
    source: SourceSection
    first: int
    last: int


class _Preparation:
    """One preparation, from files to a finished folder."""

    def __init__(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, meter: _Meter
    ) -> None:
        self._recipe = recipe
        self._report = PrepareReport(template.name, recipe.data.seq_len)
        self._stager = Stager(recipe.data, tokenizer, template, self._report, meter)
        self._contents: list[bytes] = []  # of each staged row
        self._origins: list[_Origin] = []

    def write(self, folder: Path) -> None:
        """Fill `folder` with one store per split and the report."""
        started = time.monotonic()
        write_store(folder / "staged", self._stage(), {})
        self._stager.finish()
        staged = open_store(folder / "staged")
        for name, rows in self._routes().items():
            if len(rows):
                write_store(folder / name, (staged.example(row) for row in rows.tolist()), {"split": name})
                self._report.splits[name] = SplitReport.of(open_store(folder / name))
        shutil.rmtree(folder / "staged")
        self._report.seconds = time.monotonic() - started
        self._report.write(folder / REPORT_FILE)

    def _stage(self) -> Iterator[TokenizedExample]:
        """All rows of all sources."""
        for role in ROLES:
            for source in getattr(self._recipe.data, role):
                first, counts = len(self._contents), SourceReport(source.path, role, weight=source.weight)
                self._report.sources.append(counts)
                for row in self._stager.rows(source, counts):
                    self._contents.append(row.content)
                    yield row.example
                self._origins.append(_Origin(role, source, first, len(self._contents)))

    def _routes(self) -> dict[str, np.ndarray]:
        """Split -> staged rows it holds, repeated as often as the source's weight says."""
        split_of = self._split_of_rows()
        copies = np.concatenate([np.zeros(0, dtype=np.int64), *map(self._copies, self._origins)])
        routes = {name: np.repeat(np.flatnonzero(split_of == name), copies[split_of == name]) for name in SPLITS}
        if not len(routes["train"]):
            raise DataError(self._nothing_to_train())
        self._note_overlap(split_of)
        return routes

    def _split_of_rows(self) -> np.ndarray:
        """Name of the split of each staged row: [N] of str."""
        data, seed = self._recipe.data, self._recipe.run.seed
        given = {"eval_sources": "eval", "test_sources": "test"}
        names = np.concatenate(
            [np.zeros(0, "<U5"), *(np.full(o.last - o.first, given.get(o.role, "")) for o in self._origins)]
        )
        drawn = np.flatnonzero(names == "")
        keys = [self._contents[row] for row in drawn.tolist()]
        names[drawn] = split_keys(keys, data.eval_fraction, data.test_fraction, seed)
        if data.eval_fraction and "eval" not in names and len(drawn):
            self._report.notices.append("fewer than 2 different examples: no validation split")
        return names

    def _copies(self, origin: _Origin) -> np.ndarray:
        """int64[rows of the source]."""
        key = derive_key("copies", self._recipe.run.seed, self._origins.index(origin))
        return num_copies(origin.last - origin.first, origin.source.weight, key)

    def _note_overlap(self, split_of: np.ndarray) -> None:
        """Given evaluation sets may repeat what is trained on; drawn ones cannot."""
        contents = {name: {self._contents[row] for row in np.flatnonzero(split_of == name).tolist()} for name in SPLITS}
        for name in SPLITS[1:]:
            if shared := len(contents["train"] & contents[name]):
                self._report.notices.append(
                    f"warning: {shared:,} of {len(contents[name]):,} {name} examples are in train too"
                )

    def _nothing_to_train(self) -> str:
        counts = [source for source in self._report.sources if source.role == "sources"]
        total = {
            name: sum(getattr(c, name) for c in counts) for name in ("records", "rejected", "too_long", "no_target")
        }
        return (
            f"data.sources: 0 trainable examples of {total['records']:,} records ({total['too_long']:,} longer than "
            f"data.seq_len={self._recipe.data.seq_len}, {total['no_target']:,} without a supervised token, "
            f"{total['rejected']:,} bad); raise data.seq_len, set data.long_examples=truncate or check data.loss_on"
        )


class _Meter:
    """Turns the place of a record into bytes read of all bytes."""

    def __init__(self, files: Iterable[str], progress: Progress) -> None:
        self._sizes = {path: _text_bytes(Path(path)) for path in files}
        self._progress = progress
        self._done, self._file = 0, ""

    def __call__(self, record: Record) -> None:
        if record.file != self._file:
            self._done += self._sizes.get(self._file, 0)
            self._file = record.file
        self._progress(self._done + record.byte, sum(self._sizes.values()))


def _text_bytes(path: Path) -> int:
    """Size of a file, unpacked: gzip keeps it, modulo 4 GiB, in its last four bytes (RFC 1952)."""
    size = path.stat().st_size
    if path.suffix != ".gz" or size < 4:
        return size
    with open(path, "rb") as file:
        file.seek(-4, 2)
        return int.from_bytes(file.read(4), "little")
