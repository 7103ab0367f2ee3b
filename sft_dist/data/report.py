"""What became of the data: one table per source, one per split, every reject with its place.

Kept in the cache entry beside the stores, so that a cached run tells the same story, and copied into the run folder as
`prepare_report.json`. The report lists the first rejects and drops; all of them stand beside it in `rejects.jsonl` and
`dropped.jsonl`, written line by line, so that a million of them need no memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from sft_dist.data.store import TokenStore
from sft_dist.data.task_files import TASKS
from sft_dist.data.wholes import LATER_PIECE
from sft_dist.errors import BadRecord, DataError

if TYPE_CHECKING:
    from sft_dist.data.records import Record
    from sft_dist.data.shards import Chunk
    from sft_dist.data.tokenise import Event, Shard

_HISTOGRAM_BINS = 24
_MAX_LISTED = 100
_NUM_LONGEST = 5
LANGUAGE_ROWS = 500  # of a split: enough to tell a share of one in a hundred, and soon done
_DERIVED = ("supervised_share", "duplicates")
_LOSSES = ("rejected", "too_long", "no_target", "score")  # kinds of events: an example that gives no row


@dataclass(slots=True)
class SourceReport:
    """Counts of one source, in examples unless said otherwise. A record may hold several examples."""

    path: str
    role: str  # sources | eval_sources | test_sources
    formats: list[str] = field(default_factory=list)
    guessed: bool = False
    weight: float = 1.0
    copies: float = 1.0  # of each example per epoch: the weight, after data.mixture_temperature
    files: list[str] = field(default_factory=list)
    records: int = 0
    judged: int = 0  # what can be bad alone: records, of task files their examples
    accepted: int = 0
    rejected: int = 0  # bad ones, listed in PrepareReport.rejects
    too_long: int = 0
    no_target: int = 0  # nothing supervised, or nothing left of it after truncation
    truncated: int = 0
    split: int = 0  # cut into several accepted ones
    form_skipped: int = 0  # forms of format: template that leave a record out
    score: int = 0  # below data.filters.score.min
    filtered: dict[str, int] = field(default_factory=dict)  # key of data.filters -> accepted ones left out by it
    pieces: int = 0  # accepted ones that go on where another of the same record was cut
    repeated: int = 0  # accepted ones, `pieces` too, whose content came before; kept
    tokens: int = 0  # of accepted ones
    loss_tokens: int = 0
    unknown_tokens: int = 0  # of `tokens`: for text that the tokenizer cannot spell

    @property
    def supervised_share(self) -> float:
        return self.loss_tokens / max(self.tokens, 1)

    @property
    def duplicates(self) -> int:
        """Examples that say what one before them says; of a stream, one of the last million before them."""
        return self.repeated - self.pieces

    def add(self, chunk: Chunk, shard: Shard) -> None:
        """Count the rows of one chunk."""
        if chunk.format and chunk.file not in self.files[-1:]:
            self.files.append(chunk.file)
            self.formats = sorted({*self.formats, chunk.format})
            self.guessed = chunk.source.format == "auto"
        self.records += len(chunk.records) + len(chunk.bad)
        self.accepted += len(shard.table)
        pieces = 0
        if any(event.kind == "split" for event in shard.events):
            pieces = pc.sum(pc.match_substring_regex(shard.table["part"], LATER_PIECE)).as_py() or 0
        self.pieces += pieces
        lost = sum(event.kind in _LOSSES for event in shard.events)
        of_tasks = chunk.format in TASKS
        self.judged += len(chunk.bad) + (len(shard.table) - pieces + lost if of_tasks else len(chunk.records))
        self.tokens += pc.sum(shard.table["lengths"]).as_py() or 0
        self.loss_tokens += pc.sum(shard.table["num_loss_tokens"]).as_py() or 0
        self.unknown_tokens += pc.sum(shard.table["unknown"]).as_py() or 0

    def describe(self) -> str:
        """One line for the terminal."""
        counts = {
            "bad": self.rejected,
            "too long": self.too_long,
            "without anything supervised": self.no_target,
            "truncated": self.truncated,
            "cut into pieces": self.split,
            "left out by a form": self.form_skipped,
            "below data.filters.score.min": self.score,
            **{f"left out by {kind}": count for kind, count in self.filtered.items()},
            "duplicates (kept)": self.duplicates,
        }
        rest = "".join(f", {count:,} {what}" for what, count in counts.items() if count)
        how = " + ".join(self.formats) + (" (recognised)" if self.guessed else "")
        one_each = self.accepted + self.rejected + self.too_long + self.no_target + self.score == self.records
        used = f"{self.accepted:,} of {self.records:,} records used" if one_each else ""
        mixed = f", {self.copies:g} of each per epoch" if self.copies != 1 else ""
        return f"{self.path}: {how}, {used or f'{self.accepted:,} examples from {self.records:,} records'}{rest}{mixed}"

    def warnings(self) -> list[str]:
        """A line where the model does not see what the data say."""
        if not self.unknown_tokens:
            return []
        return [
            f"warning: {self.path}: {self.unknown_tokens:,} of {self.tokens:,} tokens are the tokenizer's unknown one, "
            "for text of the data or of the chat template that it cannot spell: data inspect shows where; take a "
            "tokenizer that has these characters, or another data.chat_template"
        ]


@dataclass(slots=True)
class SplitReport:
    """One split as it is trained or evaluated; lengths in tokens."""

    examples: int
    tokens: int
    loss_tokens: int
    supervised_share: float
    lengths: dict[str, float]  # min, mean, p50, p90, p99, max
    histogram: dict[str, list[int]]  # edges[24 + 1], counts[24]
    longest: list[dict[str, Any]] = field(default_factory=list)  # id, tokens of the five longest, each row once
    languages: dict[str, int] = field(default_factory=dict)  # ISO code -> rows, of at most 500 chosen by the seed

    @classmethod
    def of(cls, store: TokenStore, languages: dict[str, int]) -> SplitReport:
        """Statistics of a store with at least one example."""
        lengths = store.lengths
        edges = np.unique(np.linspace(0, int(lengths.max()) + 1, _HISTOGRAM_BINS + 1).astype(np.int64))
        p50, p90, p99 = np.percentile(lengths, [50, 90, 99])
        return cls(
            examples=len(store),
            tokens=store.num_tokens,
            loss_tokens=int(store.num_loss_tokens.sum(dtype=np.int64)),
            supervised_share=store.supervised_share,
            lengths={
                "min": int(lengths.min()),
                "mean": float(lengths.mean()),
                "p50": float(p50),
                "p90": float(p90),
                "p99": float(p99),
                "max": int(lengths.max()),
            },
            histogram={"edges": edges.tolist(), "counts": np.histogram(lengths, edges)[0].tolist()},
            longest=[{"id": store.example(index).id, "tokens": int(lengths[index])} for index in _longest(store)],
            languages=languages,
        )

    def describe(self) -> str:
        return f"{self.examples:,} examples, {self.tokens:,} tokens, {self.supervised_share:.1%} supervised"


@dataclass(slots=True)
class PrepareReport:
    """The whole preparation."""

    template: str
    seq_len: int
    sources: list[SourceReport] = field(default_factory=list)
    splits: dict[str, SplitReport] = field(default_factory=dict)  # train, eval, test as far as they exist
    rejects: list[dict[str, Any]] = field(default_factory=list)  # file, line, byte, reason of the first bad records
    dropped: list[dict[str, Any]] = field(default_factory=list)  # the first dropped, cut or split: `count`, `leave_out`
    notices: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def reject(self, bad: BadRecord, counts: SourceReport, listing: IO[str]) -> None:
        """Count and list a bad record."""
        counts.rejected += 1
        entry = {"file": bad.file, "line": bad.line, "byte": bad.byte, "reason": bad.reason}
        _list(entry, self.rejects, listing)

    def count(self, event: Event, record: Record, counts: SourceReport, listing: IO[str]) -> None:
        """Count and list, with its place, what happened to an example of `record`: dropped, cut or split."""
        if event.kind != "rejected":
            setattr(counts, event.kind, getattr(counts, event.kind) + 1)
            place = {"id": record.id + event.part, "file": record.file, "line": record.line, "byte": record.byte}
            _list(place | {"kind": event.kind, "reason": event.reason}, self.dropped, listing)

    def leave_out(self, example_id: str, kind: str, reason: str, counts: SourceReport, listing: IO[str]) -> None:
        """Count and list an accepted example that a filter of the recipe leaves out. Its record is not at hand any
        more: its id, which begins with file and line, is its place."""
        counts.filtered[kind] = counts.filtered.get(kind, 0) + 1
        _list({"id": example_id, "kind": kind, "reason": reason}, self.dropped, listing)

    def check_bad_fraction(self, allowed: float) -> None:
        """Raise DataError when more than this share of all records, bad ones included, are bad; of a task file each
        example counts as one."""
        num_bad, num_all, num_records = (
            sum(getattr(s, name) for s in self.sources) for name in ("rejected", "judged", "records")
        )
        if num_bad > allowed * num_all:
            first = BadRecord(**self.rejects[0])
            what = "records" if num_all == num_records else "examples"
            raise DataError(
                f"{num_bad:,} of {num_all:,} {what} are bad ({num_bad / max(num_all, 1):.1%}), more than "
                f"data.max_bad_fraction={allowed}; the first: {first}"
            )

    def nothing_to_train(self) -> str:
        """Why no example of `data.sources` is left, with what would help."""
        counts = [source for source in self.sources if source.role == "sources"]
        num_records = sum(c.records for c in counts)
        if not num_records:
            return f"data.sources: 0 records in {', '.join(c.path for c in counts)}: the files are empty"
        if any(c.accepted > sum(c.filtered.values()) for c in counts):
            return (
                f"data.sources: 0 of {sum(c.accepted for c in counts):,} usable examples are trained per epoch: raise "
                "weight of the sources, or lower data.eval_fraction and data.test_fraction"
            )
        lost, remedies = (", ".join(words) for words in zip(*self._losses(counts), strict=True))
        return f"data.sources: 0 trainable examples of {num_records:,} records ({lost}); {remedies}"

    def _losses(self, counts: list[SourceReport]) -> Iterator[tuple[str, str]]:
        """What became of examples that are not trained, and what would help."""
        longer = f"longer than data.seq_len={self.seq_len}"
        for name, what, remedy in (
            ("too_long", longer, "raise data.seq_len or set data.long_examples=truncate"),
            ("no_target", "without a supervised token", "check data.loss_on"),
            ("form_skipped", "left out by a form", "check the template of the source"),
            ("score", "left out by data.filters.score", "lower its min or check its column"),
            ("rejected", "bad", "mend them"),
        ):
            if num := sum(getattr(c, name) for c in counts):
                yield f"{num:,} {what}", remedy
        filtered = sum((Counter(c.filtered) for c in counts), Counter[str]())
        for kind, num in filtered.items():
            key = "data.near_duplicates" if kind == "drop_near_duplicates" else f"data.filters.{kind}"
            yield f"{num:,} left out by {key}", f"relax {key}"

    def behind(self, streamed: PrepareReport) -> PrepareReport:
        """This report behind the one of the streamed sources."""
        return replace(
            self,
            sources=[*streamed.sources, *self.sources],
            rejects=[*streamed.rejects, *self.rejects],
            dropped=[*streamed.dropped, *self.dropped],
            notices=["streamed sources: what was read so far", *self.notices],
        )

    def lines(self) -> list[str]:
        """What a user reads at the start of a run."""
        splits = [f"{name}: {split.describe()}" for name, split in self.splits.items()]
        return [*(source.describe() for source in self.sources), *splits, *self.told()]

    def told(self) -> list[str]:
        """What a user should know beside the counts: warnings of the sources, and notices."""
        return [*(line for source in self.sources for line in source.warnings()), *self.notices]

    def shown(self) -> dict[str, Any]:
        """`as_dict` for whoever reads it: the warnings of the sources are among the notices."""
        return self.as_dict() | {"notices": self.told()}

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; what follows from the counts of each source included."""
        values = asdict(self)
        for written, source in zip(values["sources"], self.sources, strict=True):
            written |= {name: getattr(source, name) for name in _DERIVED}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrepareReport:
        """The inverse of `as_dict`."""
        sources = [{k: v for k, v in source.items() if k not in _DERIVED} for source in values["sources"]]
        parts = {
            "sources": [SourceReport(**source) for source in sources],
            "splits": {name: SplitReport(**split) for name, split in values["splits"].items()},
        }
        return cls(**(values | parts))

    def write(self, path: str | Path) -> None:
        """Write the report as JSON, as the run folder's `prepare_report.json`."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> PrepareReport:
        """Read what `write` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _longest(store: TokenStore) -> list[int]:
    """Examples with the longest rows, the longest first; of a row that a mix repeats the first."""
    lengths = np.where(np.append(True, store.rows[1:] != store.rows[:-1]), store.lengths, 0)  # copies stand together
    num = min(_NUM_LONGEST, int(np.count_nonzero(lengths)))
    shortest = np.partition(lengths, -num)[-num]
    longer, equal = np.flatnonzero(lengths > shortest), np.flatnonzero(lengths == shortest)
    found = [*longer.tolist(), *equal[: num - len(longer)].tolist()]
    return sorted(found, key=lambda index: (-int(lengths[index]), index))


def _list(entry: dict[str, Any], listed: list[dict[str, Any]], listing: IO[str]) -> None:
    """The first hundred in the report, all of them in the file."""
    if len(listed) < _MAX_LISTED:
        listed.append(entry)
    listing.write(json.dumps(entry, ensure_ascii=False) + "\n")
