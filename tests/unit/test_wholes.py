"""Pieces of one conversation are one conversation again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import byte_tokenizer, decoded, make_recipe, said, write_lines

from sft_dist.data.prepare import prepare
from sft_dist.data.survey import survey
from sft_dist.data.tokenise import split, trim
from sft_dist.data.wholes import joined
from sft_dist.types import TokenizedExample


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=6), st.integers(2, 12))
def test_pieces_are_put_together_as_they_were(turns, longest):
    """Questions and answers of some tokens; what no piece holds is learned by nobody."""
    weights = np.concatenate([[0.0], *[[0.0] * asked + [1.0] * told for asked, told in turns]]).astype(np.float32)
    ends = 1 + np.cumsum([asked + told for asked, told in turns])
    answers = tuple((int(end) - told, int(end)) for end, (_, told) in zip(ends, turns, strict=True))
    example = TokenizedExample(np.arange(len(weights), dtype=np.int32), weights, "f", "f:1", answers)
    whole = joined(split(trim(example), longest))
    learned = [[one.input_ids[start:end].tolist() for start, end in one.answers] for one in (whole, example)]
    assert learned[0] == learned[1]
    assert (whole.input_ids[whole.loss_weights > 0] == example.input_ids[weights > 0]).all()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def long_rows(num: int, answer) -> list[dict[str, str]]:
    return [{"instruction": f"Question {n}", "output": answer(n)} for n in range(num)]


def test_a_filter_judges_a_conversation_by_all_its_pieces(tmp_path, tokenizer):
    """Answers of 1,990 characters end in pieces of a few tokens, which were left out as answers of their own."""
    rows = long_rows(20, lambda n: f"{n:04} ".ljust(1990, "abcdefgh ijkl"[n % 13]))
    rows += [{"instruction": "Short?", "output": "yes"}]
    filters = {"min_answer_tokens": 100}
    asked = {"long_examples": "split", "seq_len": 500, "eval_fraction": 0.0}
    source = write_lines(tmp_path / "a.jsonl", rows)
    kept = prepare(make_recipe(tmp_path, source, filters=filters, **asked), tokenizer, notice=said)
    assert kept.report.sources[0].filtered == {"min_answer_tokens": 1}
    whole = prepare(
        make_recipe(tmp_path, write_lines(tmp_path / "b.jsonl", rows[:-1]), **asked), tokenizer, notice=said
    )
    assert decoded(kept.train, tokenizer) == decoded(whole.train, tokenizer) and len(kept.train) >= 100


def test_all_pieces_of_a_conversation_go_together(tmp_path, tokenizer):
    rows = long_rows(3, lambda n: f"{n:04} " * 200)
    rows[1]["output"] = "I'm sorry, but I can't help with that request. " + " ".join(map(str, range(200)))
    asked = {"long_examples": "split", "eval_fraction": 0.0, "filters": {"drop_refusals": True}}
    data = prepare(make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", rows), **asked), tokenizer, notice=said)
    assert {one.id.split(":")[1].split("/")[0] for one in data.train} == {"1", "3"}
    assert data.report.sources[0].filtered["drop_refusals"] > 1


def test_a_conversation_is_no_near_duplicate_of_itself(tmp_path, tokenizer):
    rows = long_rows(1, lambda n: "the same words again and again. " * 90)
    asked = {"long_examples": "split", "eval_fraction": 0.0, "near_duplicates": "drop"}
    data = prepare(make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", rows), **asked), tokenizer, notice=said)
    assert len(data.train) == data.report.sources[0].accepted > 10
    twice = write_lines(tmp_path / "b.jsonl", [rows[0], rows[0] | {"output": rows[0]["output"] + "!"}])
    data = prepare(make_recipe(tmp_path, twice, **asked), tokenizer, notice=said)
    assert {one.id.split(":")[1].split("/")[0] for one in data.train} == {"1"}


def test_our_own_cuts_are_no_sign_of_quality(tmp_path, tokenizer):
    """The survey looks at the conversation: it is not cut off, and it repeats nothing."""
    rows = long_rows(2, lambda n: " ".join(str(n * 1000 + k) for k in range(300)) + ".")
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", rows), long_examples="split", eval_fraction=0.0)
    data = prepare(recipe, tokenizer, notice=said)
    found = survey({"train": data.train}, data.template, tokenizer, seed=0)
    assert len(data.train) > 8 and found.looked_at == {"train": 2}
    assert found.findings["cut_off"].count == found.exact.num_rows == found.near.num_rows == 0
    assert sum(found.lengths["answer, tokens"]["counts"]) == 2
