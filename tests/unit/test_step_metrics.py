"""What a step trained is accounted to the sources it came from, tokens and learned tokens alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sft_dist.data.prepare import prepare
from sft_dist.step_metrics import sum_by_source
from tests.preparing import byte_tokenizer, make_recipe, records, said, write_lines


def test_the_sums_of_the_sources_are_those_of_their_examples(tmp_path: Path) -> None:
    short = write_lines(tmp_path / "short.jsonl", records(30, "{}"))
    long = write_lines(tmp_path / "long.jsonl", records(20, "a much longer answer, number {}"))
    recipe = make_recipe(tmp_path, short, {"path": str(long), "weight": 2.0}, eval_fraction=0.0)
    store = prepare(recipe, byte_tokenizer(), notice=said).train
    everything = np.arange(len(store))
    tokens = sum_by_source(store, everything, store.lengths.__getitem__)
    learned = sum_by_source(store, everything, store.loss_tokens_of)
    stop = 1  # the end token is one id
    digits = sum(len(str(n)) for n in range(30)), sum(len(str(n)) for n in range(20))
    assert learned == {
        str(short): digits[0] + 30 * stop,
        str(long): 2 * (digits[1] + 20 * (len("a much longer answer, number ") + stop)),
    }
    assert tokens is not None and sum(tokens.values()) == store.num_tokens
    assert sum(learned.values()) == int(store.num_loss_tokens.sum())
    assert list(sum_by_source(store, everything[:1], store.loss_tokens_of)) == [str(short)]


def test_one_source_needs_no_account(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", records(3))
    store = prepare(make_recipe(tmp_path, source), byte_tokenizer(), notice=said).train
    assert sum_by_source(store, np.arange(len(store)), store.loss_tokens_of) is None
