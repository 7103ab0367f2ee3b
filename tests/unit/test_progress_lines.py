"""A log learns how far a preparation is: not too often, and with numbers that fit."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from sft_dist import inputs
from sft_dist.observe.progress_lines import ProgressLines
from tests.preparing import byte_tokenizer, make_recipe, records, write_lines


def test_one_line_in_ten_seconds_with_share_rate_and_time_left() -> None:
    seconds, told = count(), list[str]()
    lines = ProgressLines(told.append, lambda: float(next(seconds)))
    for second in range(1, 36):
        lines(second * 41_000_000, 5_300_000_000)
    assert told == [
        "preparing: 0.41 of 5.30 GB (8 %), 41.0 MB/s, about 0:01:59 left",
        "preparing: 0.82 of 5.30 GB (15 %), 41.0 MB/s, about 0:01:49 left",
        "preparing: 1.23 of 5.30 GB (23 %), 41.0 MB/s, about 0:01:39 left",
    ]


def test_a_small_file_and_what_is_not_known() -> None:
    seconds, told = count(step=20), list[str]()
    lines = ProgressLines(told.append, lambda: float(next(seconds)))
    lines(0, 0)
    assert told == []
    lines(0, 2_000_000)
    lines(1_500_000, 2_000_000)
    assert told == [
        "preparing: 0.00 of 2.00 MB (0 %), 0.0 MB/s",
        "preparing: 1.50 of 2.00 MB (75 %), 0.0 MB/s, about 0:00:20 left",
    ]


def test_rows_have_a_count_and_what_follows_reading_a_time() -> None:
    seconds, told = count(step=20), list[str]()
    lines = ProgressLines(told.append, lambda: float(next(seconds)), title="looking", unit="rows")
    lines.stay()  # another process reads
    lines(80_000, 200_000)
    lines.stay()
    assert told == [
        "looking: 80,000 of 200,000 rows (40 %), 2,000 rows/s, about 0:01:00 left",
        "looking: all is read; choosing the rows of each split, 0:01:00 so far",
    ]


def test_a_stream_has_a_count_and_a_rate_since_the_line_before() -> None:
    seconds, told = iter([0, 5, 10, 12, 20, 120, 121]), list[str]()
    lines = ProgressLines(told.append, lambda: float(next(seconds)))
    for read in (1000, 2000, 2500, 5000, 0, 105_000):
        lines.stream(read)
    assert told == [
        "reading the stream: 2,000 records, 200 records/s",
        "reading the stream: 5,000 records, 300 records/s",
        "reading the stream: 105,000 records, 990 records/s",
    ]


def test_training_says_how_far_its_preparation_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = count(step=11)
    monkeypatch.setattr(inputs, "ProgressLines", lambda say: ProgressLines(say, lambda: float(next(seconds))))
    monkeypatch.setattr(inputs, "load_tokenizer", lambda model: byte_tokenizer())
    source = write_lines(tmp_path / "a.jsonl", records(40))
    told: list[str] = []
    for _ in range(2):  # the second time there is nothing to prepare, and nothing to say
        inputs.read_inputs(make_recipe(tmp_path, source), told.append)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("preparing: 0.00 of 0.00 MB (9") and all("choosing" in line for line in said[1:])
    assert not any(line.startswith("preparing") for line in told)
    assert len({line.partition(" of each split, ")[2] for line in said[1:]}) == len(said) - 1 > 0


@pytest.mark.parametrize("given", ["auto", "alpaca"])
def test_training_shows_three_examples_of_a_format_that_it_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setattr(inputs, "load_tokenizer", lambda model: byte_tokenizer())
    path = write_lines(tmp_path / "a.jsonl", records(40, "answer " + "long\n" * 20 + "number {}"))
    shown = []
    for _ in range(2):
        told: list[str] = []
        inputs.read_inputs(make_recipe(tmp_path, {"path": str(path), "format": given}), told.append)
        shown.append([line for line in told if "⟦" in line])
    assert [len(lines) for lines in shown] == [4 if given == "auto" else 0, 0]  # known now, they are not shown again
    for line in shown[0][1:]:
        number = int(line.partition("question ")[2].partition("<")[0])
        before = f"<|im_start|>user⏎question {number}<|im_end|>⏎<|im_start|>assistant⏎"
        learned = f"answer long⏎long⏎long⏎long⏎lon…number {number}<|im_end|>"
        row, _, text = line.removeprefix("  row ").partition("  ")
        assert text == f"…{before[-56:]}⟦{learned.partition('…')[0]}…{learned[-18:]}⟧" and len(line) < 130
        assert row.isdigit()
