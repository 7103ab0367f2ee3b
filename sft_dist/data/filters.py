"""What a recipe asks to leave out: rules over stored conversations, and a score that stands in the record.

    drops(batches, said_of, Filters(drop_refusals=True), protected) -> [Drop(row, kind, reason), ...]
    score_too_low(record, column="score", minimum=4.5)              -> reason, or None to keep it

Nothing is dropped unless a key asks for it. Rows are conversations here: one that was cut into pieces is judged whole,
and goes or stays with all of them. Each dropped row has one kind, the first that fits, and a reason with its
value. Protected rows, those of evaluation sources, are the yardstick: they always stay, and a training row that is a
near-duplicate of one goes. Of other near-duplicates the first stays, whatever its splits will be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np

from sft_dist.config.schema import ScoreSection
from sft_dist.data.duplicates import clusters, near_pairs, sketches_of
from sft_dist.data.exchanges import Exchange, text_of
from sft_dist.data.quality import repetition
from sft_dist.data.refusals import is_refusal

_MOST_COLUMNS, _SHOWN_COLUMNS = 1000, 12
Said = Sequence[Exchange]


@dataclass(frozen=True, slots=True)
class Filters:
    """What to leave out; the defaults leave out nothing."""

    min_answer_tokens: int = 0  # of the shortest answer of a row, stop included
    max_repetition: float = 1.0  # share of repeated 4-grams in any answer
    drop_refusals: bool = False
    drop_near_duplicates: bool = False


class Drop(NamedTuple):
    """A row that goes; `kind` is a key of the filters, `like` the row that stays of those it is a near-duplicate of."""

    row: int
    kind: str
    reason: str
    like: int | None = None


def drops(
    batches: Iterable[Sequence[Said]], said_of: Callable[[int], Said], filters: Filters, protected: np.ndarray
) -> list[Drop]:
    """Rows to leave out, in order.

    `batches`: the exchanges of all rows, in order, some rows at a time; `said_of(row)` gives those of one row again.
    `protected` bool[N]: rows that stay.
    """
    found: dict[int, Drop] = {}
    judged = _judged(batches, filters, protected, found)
    if filters.drop_near_duplicates:
        texts = (map(text_of, batch) for batch in judged)
        pairs = near_pairs(sketches_of(texts, len(protected)), lambda row: text_of(said_of(row)))
        kept_pairs = (pair for pair in pairs if pair.first not in found and pair.second not in found)
        found |= {drop.row: drop for cluster in clusters(kept_pairs) for drop in _all_but_one(cluster, protected)}
    for _ in judged:
        pass
    return [found[row] for row in sorted(found)]


def _judged(
    batches: Iterable[Sequence[Said]], filters: Filters, protected: np.ndarray, found: dict[int, Drop]
) -> Iterator[Sequence[Said]]:
    """The same batches; `found` gets the rows that break a rule."""
    rows = count()
    for batch in batches:
        for said, row in zip(batch, rows, strict=False):
            broken = None if protected[row] else _broken_rule(said, filters)
            if broken:
                found[row] = Drop(row, *broken)
        yield batch


def score_too_low(record: Mapping[str, Any], column: str, minimum: float) -> str | None:
    """Why a record's score does not let it in; None when it does. A missing score is no score.

    Cells of CSV are text, and decimals of Parquet a type of their own: both are read as numbers.
    """
    given = record.get(column)
    score = _number(given)
    if score is None:
        return f"{column}={given!r} is no number, so it cannot be held against data.filters.score.min={minimum:g}"
    return f"{column}={score:g} is below data.filters.score.min={minimum:g}" if score < minimum else None


class ScoreColumn:
    """Whether the records of each source have the column that the score is read from."""

    def __init__(self, score: ScoreSection) -> None:
        self._score = score
        self._names: dict[str, dict[str, None]] = {}  # path of a source -> names of its columns, as far as looked at

    def look(self, source: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Note the columns of some records, until one has the score."""
        names = self._names.setdefault(source, {})
        for record in records:
            if self._score.column in names:
                return
            names |= dict.fromkeys(islice(record, _MOST_COLUMNS))
            if self._score.column in record:
                names[self._score.column] = None

    def notices(self) -> Iterator[str]:
        """One for each source without the column, all of whose records are left out."""
        column = self._score.column
        for source, names in self._names.items():
            if names and column not in names:
                close = get_close_matches(column, names, n=1)
                mean = f", did you mean {close[0]!r}?" if close else ""
                shown = ", ".join(list(names)[:_SHOWN_COLUMNS])
                yield f"data.filters.score.column={column}: no record of {source} has it{mean} (there are {shown})"


def _number(value: Any) -> float | None:
    """None for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _broken_rule(said: Said, filters: Filters) -> tuple[str, str] | None:
    """Kind and reason of the first rule that a row breaks."""
    tokens = min((one.num_answer_tokens for one in said), default=0)
    if tokens < filters.min_answer_tokens:
        return "min_answer_tokens", f"an answer of {tokens} tokens; {filters.min_answer_tokens} are asked for"
    repeated = max((repetition(one.answer) for one in said), default=0.0) if filters.max_repetition < 1 else 0.0
    if repeated > filters.max_repetition:
        return "max_repetition", f"{repeated:.0%} of an answer's 4-grams repeat; {filters.max_repetition:.0%} may"
    if filters.drop_refusals and any(is_refusal(one.answer) for one in said):
        return "drop_refusals", "an answer begins like a refusal"
    return None


def _all_but_one(cluster: Sequence[int], protected: np.ndarray) -> Iterator[Drop]:
    """All rows of a cluster but the protected ones, or but the first when none is."""
    kept = [row for row in cluster if protected[row]] or cluster[:1]
    for row in cluster:
        if row not in kept:
            yield Drop(row, "drop_near_duplicates", "near-duplicate of", kept[0])
