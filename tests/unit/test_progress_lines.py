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
    assert len(said) == 1 and said[0].startswith("preparing: 0.00 of 0.00 MB (9")
    assert not any(line.startswith("preparing") for line in told)
