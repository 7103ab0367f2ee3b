"""The generated skills: right answers, no held-out input in training, the same bytes for the same seed."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from sft_dist.data.templates import resolve_template
from sft_dist.generate.checks import CHECKS, is_right
from sft_dist.generate.skills import (
    draw_example,
    heldout_examples,
    training_examples,
    vocabulary_texts,
    write_skills,
)
from sft_dist.generate.tasks import SKILLS, input_keys
from sft_dist.generate.tokenizer import END, UNKNOWN, build_tokenizer
from sft_dist.types import Conversation, Message


@pytest.fixture(scope="module")
def heldout():
    return heldout_examples(170, Random("test"))


@pytest.fixture(scope="module")
def training(heldout):
    return list(training_examples(4000, Random("train"), heldout))


def prompts(example):
    """The text before each answer: all turns so far, and the question."""
    said = ""
    for question, answer in example.turns:
        yield said + question
        said += f"{question}\n{answer}\n"


@pytest.mark.parametrize("skill", SKILLS)
def test_an_independent_check_agrees_with_every_answer(skill):
    rng = Random(f"check {skill}")
    for _ in range(300):
        example = draw_example(skill, rng)
        assert is_right(skill, example.facts, example.turns[-1][1]), example


@pytest.mark.parametrize("skill", SKILLS)
def test_checks_refuse_the_answer_of_another_task(skill):
    rng = Random(f"refuse {skill}")
    examples = [draw_example(skill, rng) for _ in range(200)]
    for example, other in pairwise(examples):
        answer = other.turns[-1][1]
        assert is_right(skill, example.facts, answer) == (answer == example.turns[-1][1])
        assert not is_right(skill, example.facts, "")


def test_every_skill_has_a_check():
    assert list(CHECKS) == list(SKILLS) or set(CHECKS) == set(SKILLS)


def test_no_held_out_prompt_occurs_in_training(heldout, training):
    asked = {prompt for example in training for prompt in prompts(example)}
    assert asked.isdisjoint(list(prompts(example))[-1] for example in heldout)


def test_no_held_out_input_occurs_in_training_in_other_words(heldout, training):
    asked = {key for example in training for key in input_keys(example.skill, example.facts)}
    assert asked.isdisjoint(input_keys(example.skill, example.facts)[-1] for example in heldout)


def test_without_the_guard_held_out_inputs_would_return(heldout):
    unguarded = list(training_examples(4000, Random("train"), []))
    asked = {key for example in unguarded for key in input_keys(example.skill, example.facts)}
    assert not asked.isdisjoint(input_keys(example.skill, example.facts)[-1] for example in heldout)


def test_held_out_has_every_skill_equally_often_and_no_input_twice(heldout):
    assert set(Counter(example.skill for example in heldout).values()) == {170 // len(SKILLS)}
    assert len({input_keys(example.skill, example.facts)[-1] for example in heldout}) == len(heldout)


def test_facts_decide_the_conversation_except_for_its_wording():
    rng = Random("wording")
    for skill in SKILLS:
        example = draw_example(skill, rng)
        again = SKILLS[skill].converse(example.facts, Random("other"))
        assert [answer for _, answer in again] == [answer for _, answer in example.turns]


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    names = ("train.jsonl", "test.jsonl", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_skills(tmp_path / folder, seed=seed, num_train=200, num_test=36)
    read = {folder: [(tmp_path / folder / name).read_bytes() for name in names] for folder in "abc"}
    assert read["a"] == read["b"]
    assert read["a"][0] != read["c"][0]
    assert read["a"][1] != read["c"][1]


def test_records_are_messages_with_their_skill_and_facts(tmp_path):
    write_skills(tmp_path, seed=0, num_train=50, num_test=36)
    for line in (tmp_path / "test.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert [m["role"] for m in record["messages"]] == ["user", "assistant"] * (len(record["messages"]) // 2)
        assert is_right(record["skill"], record["facts"], record["messages"][-1]["content"])


def test_the_tokenizer_knows_every_word_and_gives_the_text_back(training):
    tokenizer = build_tokenizer(vocabulary_texts())
    for example in training[:500]:
        for text in (text for turn in example.turns for text in turn):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids, text
            assert tokenizer.decode(ids) == text


def test_a_saved_tokenizer_loads_with_its_template(tmp_path: Path):
    from transformers import AutoTokenizer

    write_skills(tmp_path, seed=0, num_train=20, num_test=18)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Add 12 and 30."}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|user|>Add 12 and 30.<|end|><|assistant|>"
    assert tokenizer.eos_token == END
    assert tokenizer("zebra").input_ids == [tokenizer.convert_tokens_to_ids(UNKNOWN)]


def test_answers_and_their_stop_token_are_all_that_is_supervised():
    tokenizer = build_tokenizer(vocabulary_texts())
    template = resolve_template("auto", tokenizer)
    turns = [
        ("user", "Sort these words: plum fig"),
        ("assistant", "fig plum"),
        ("user", "Now in capitals."),
        ("assistant", "FIG PLUM"),
    ]
    conversation = Conversation(tuple(Message(role, content) for role, content in turns))
    example = template.tokenize(conversation, tokenizer, loss_on="assistant")
    supervised = example.input_ids[example.loss_weights > 0]
    assert tokenizer.convert_ids_to_tokens(supervised.tolist()) == ["▁fig", "▁plum", END, "▁FIG", "▁PLUM", END]
    assert template.stop_token_ids(tokenizer) == [tokenizer.eos_token_id]
