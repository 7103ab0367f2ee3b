"""Rows that a recipe asks to leave out: rules over stored rows, and a score that stands in the record.

    drops(batches, said_of, Filters(drop_refusals=True), protected) -> [Drop(row, kind, reason), ...]
    score_too_low(record, column="score", minimum=4.5)              -> reason, or None to keep it

Nothing is dropped unless a key asks for it. Each dropped row has one kind, the first that fits, and a reason with its
value. Protected rows, those of evaluation sources, are the yardstick: they always stay, and a training row that is a
near-duplicate of one goes. Of other near-duplicates the first stays, whatever its splits will be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sft_dist.data.duplicates import clusters, near_pairs, sketch
from sft_dist.data.exchanges import Exchange, text_of
from sft_dist.data.quality import repetition
from sft_dist.data.refusals import is_refusal

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
    sketches, num_rows = [], 0
    for batch in batches:
        for row, said in enumerate(batch, num_rows):
            broken = None if protected[row] else _broken_rule(said, filters)
            if broken:
                found[row] = Drop(row, *broken)
        if filters.drop_near_duplicates:
            sketches.append(sketch(map(text_of, batch)))
        num_rows += len(batch)
    if sketches:
        pairs = near_pairs(np.concatenate(sketches), lambda row: text_of(said_of(row)))
        kept_pairs = (pair for pair in pairs if pair.first not in found and pair.second not in found)
        found |= {drop.row: drop for cluster in clusters(kept_pairs) for drop in _all_but_one(cluster, protected)}
    return [found[row] for row in sorted(found)]


def score_too_low(record: Mapping[str, Any], column: str, minimum: float) -> str | None:
    """Why a record's score does not let it in; None when it does. A missing score is no score."""
    score = record.get(column)
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        return f"{column}={score!r} is no number, so it cannot be held against data.filters.score.min={minimum:g}"
    return f"{column}={score:g} is below data.filters.score.min={minimum:g}" if score < minimum else None


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
