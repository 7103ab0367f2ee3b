"""Rows are left out only on request, each for one reason, and evaluation rows never."""

import tracemalloc
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.exchanges import Exchange
from sft_dist.data.filters import Drop, Filters, drops, score_too_low

ANSWERS = [
    "Paris is the capital of France, on the Seine.",
    "No.",
    "go go go " * 20,
    "I'm sorry, but I cannot help with that.",
    "Paris is the capital of France, on the Seine!",
    "A wholly different answer about the moons of Jupiter.",
]
ROWS = [(Exchange("", answer, 0, len(answer.split())),) for answer in ANSWERS]


def left_out(filters: Filters, protected=(), size: int = 4) -> list[Drop]:
    batches = (ROWS[at : at + size] for at in range(0, len(ROWS), size))
    return drops(batches, ROWS.__getitem__, filters, np.isin(np.arange(len(ROWS)), protected))


def test_nothing_goes_unasked():
    assert left_out(Filters()) == []


@pytest.mark.parametrize(
    ("filters", "rows", "reason"),
    [
        (Filters(min_answer_tokens=3), [1], "an answer of 1 tokens; 3 are asked for"),
        (Filters(max_repetition=0.5), [2], "98% of an answer's 4-grams repeat; 50% may"),
        (Filters(drop_refusals=True), [3], "an answer begins like a refusal"),
        (Filters(drop_near_duplicates=True), [4], "near-duplicate of"),
    ],
    ids=["short", "repetitive", "refusal", "near-duplicate"],
)
def test_each_filter(filters, rows, reason):
    found = left_out(filters)
    assert [drop.row for drop in found] == rows
    assert found[0].reason == reason and found[0].kind in Filters.__slots__
    assert found[0].like == (0 if filters.drop_near_duplicates else None)


def test_a_row_goes_once_for_the_first_reason():
    found = left_out(Filters(min_answer_tokens=1000, max_repetition=0.1, drop_refusals=True, drop_near_duplicates=True))
    assert [(drop.row, drop.kind) for drop in found] == [(row, "min_answer_tokens") for row in range(len(ROWS))]


def test_protected_rows_stay_and_training_rows_like_them_go():
    everything = Filters(min_answer_tokens=3, max_repetition=0.5, drop_refusals=True, drop_near_duplicates=True)
    assert [drop.row for drop in left_out(everything, protected=[1, 2, 3, 4])] == [0]
    assert left_out(everything, protected=range(len(ROWS))) == []


@given(st.integers(1, 7))
def test_batches_make_no_difference(size):
    filters = Filters(min_answer_tokens=3, drop_near_duplicates=True)
    assert left_out(filters, size=size) == left_out(filters, size=len(ROWS))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"score": 4.5}, None),
        ({"score": 5}, None),
        ({"score": 4.4}, "score=4.4 is below data.filters.score.min=4.5"),
        ({"score": "4.5"}, None),  # a cell of CSV
        ({"score": " 4 "}, "score=4 is below data.filters.score.min=4.5"),
        ({"score": Decimal("4.50")}, None),  # of Parquet
        ({"score": Decimal("NaN")}, "score=Decimal('NaN') is no number"),
        ({"score": "good"}, "score='good' is no number"),
        ({"score": 10**400}, "score=1"),
        ({"score": [5]}, "score=[5] is no number"),
        ({"score": True}, "score=True is no number"),
        ({"score": float("nan")}, "score=nan is no number"),
        ({}, "score=None is no number"),
    ],
)
def test_scores(record, reason):
    found = score_too_low(record, "score", 4.5)
    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_looking_for_near_duplicates_takes_what_the_documentation_says():
    """Some 610 bytes a row, of which 512 are the sketch (docs/data.md), beside what does not grow with the rows."""

    def said(row: int):
        words = (str(row * 7919 * n % 1_000_003) for n in range(1, 12))
        return (Exchange(f"question {row}", " ".join(words), 2, 20),)

    def peak(num: int) -> int:
        batches = ([said(row) for row in range(at, at + 1000)] for at in range(0, num, 1000))
        tracemalloc.start()
        found = drops(batches, said, Filters(drop_near_duplicates=True), np.zeros(num, bool))
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert not found
        return taken

    peak(1000)  # what is imported on the way
    assert 512 < (peak(6_000) - peak(3_000)) / 3_000 < 640
