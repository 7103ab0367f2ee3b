"""Junk at any place of a real record, in every format: rows, or a word about the record; never an exception.

One odd record among millions must not end a preparation that was told to skip bad ones.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import byte_tokenizer

from sft_dist.config.schema import SourceSection
from sft_dist.data.formats import _SIGNATURES
from sft_dist.data.plain_tokenizer import PlainTokenizer
from sft_dist.data.records import Record
from sft_dist.data.templates import ChatTemplate, resolve_template
from sft_dist.data.tokenise import Rules, Shard, tokenise

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": {"y": [1]}}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "q"}], "name": "me"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm", "weight": 0.5},
    {"role": "tool", "content": "r", "tool_call_id": "1"},
    {"role": "assistant", "content": "a", "function_call": {"name": "f", "arguments": "{}"}, "train": True},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
]
RECORDS: dict[str, dict[str, Any]] = {
    "messages": {"messages": CHAT, "tools": [TOOL], "images": [], "id": 1},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a", "loss_weight": 1},
        ],
        "system": "s",
        "functions": [{"name": "f"}],
    },
    "alpaca": {
        "instruction": "q",
        "input": "i",
        "output": "a",
        "system": "s",
        "history": [["x", "y"]],
        "thinking": "t",
    },
    "dolly": {"instruction": "q", "context": "c", "response": "a", "tools": [TOOL]},
    "prompt_completion": {"prompt": CHAT[:2], "completion": CHAT[-1:], "tools": [TOOL]},
    "question_answer": {"question": "q", "answer": "a", "system": "s"},
    "chain_of_thought": {"question": "q", "answer": "a", "rationale": "r"},
    "self_instruct": {"instruction": "q", "instances": [{"input": "i", "output": "a"}, {"output": "b"}]},
    "natural_instructions": {
        "Definition": ["d"],
        "Instances": [{"id": "t-1", "input": "x", "output": ["a", "b"]}, {"id": "t-2", "input": "y", "output": ["c"]}],
    },
    "oasst": {
        "prompt": {
            "role": "prompter",
            "text": "q",
            "replies": [
                {"role": "assistant", "text": "a", "replies": [{"role": "prompter", "text": "q", "replies": []}]}
            ],
        }
    },
    "tokenized": {"input_ids": [1, 2, 3], "loss_weights": [0, 1, 0.5], "attention_mask": [1, 1, 1]},
    "text": {"text": "t", "url": "u"},
    "template": {"premise": "p", "hypothesis": "h", "label": 1, "options": ["x", {"y": 1}]},
}
FORMS = """
forms:
  - name: follows
    prompt: "{{ premise }} Does it follow that {{ hypothesis }}? {{ choices | join(' or ') }}, {{ options[0] }}"
    answer: "{{ choices[label] }}"
    choices: [yes, maybe, no]
  - name: count
    prompt: "How many words has {{ hypothesis }}?"
    answer: "{{ hypothesis.split() | length + label }}"
"""
# Calls and tools as text, without a filter that would refuse what JSON cannot hold.
PLAIN = """{% for tool in tools or [] %}{{ tool.function.name }}{{ tool.function.parameters }}{% endfor %}
{%- for m in messages %}<|{{ m.role }}|>{{ m.reasoning_content }}{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function.name }}
{%- for key, value in call.function.arguments.items() %}{{ key }}{{ value }}{% endfor %}
{%- endfor %}<|im_end|>{% endfor %}"""
# What JSON can hold, and what typed tables hold beside it.
JUNK: list[Any] = [
    None, True, False, 0, -1, 7, 1.5, 1 << 70, float("nan"), float("inf"), "", " ", "a", "{", "[1]", "<image>",
    [], [None], [[]], [1, "a"], [{"role": "user"}], {}, {"": ""}, {"a": None}, {"role": "assistant", "content": "a"},
    date(2024, 1, 2), datetime(2024, 1, 2, tzinfo=UTC), timedelta(1), Decimal("1.5"), b"\xff",
    {"on": datetime(2024, 1, 2, tzinfo=UTC)}, [b"\xff"],
]  # fmt: skip
VALUES = st.sampled_from(JUNK) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


def paths(value: Any) -> Iterator[tuple[Any, ...]]:
    """Where junk may stand: at each value inside, and under a key that was not there."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (key,)
        yield from ((key, *rest) for rest in paths(item))
    if isinstance(value, dict):
        keys = (
            "tools",
            "functions",
            "system",
            "history",
            "images",
            "function_call",
            "tool_calls",
            "weight",
            "thinking",
        )
        yield from ((key,) for key in keys if key not in value)


def changed(record: dict[str, Any], path: tuple[Any, ...], junk: Any) -> dict[str, Any]:
    found = copy.deepcopy(record)
    at: Any = found
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = junk
    return found


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("forms") / "forms.yaml"
    path.write_text(FORMS)
    return str(path)


@cache
def rules(template: str) -> Rules:
    tokenizer = byte_tokenizer()
    given = ChatTemplate(template, PLAIN) if template == "plain" else resolve_template(template, tokenizer)
    plain = PlainTokenizer.of(tokenizer)
    return Rules(plain, given, loss_on="assistant", prompt_loss_weight=0.5, seq_len=4096, long_examples="drop")


def tokenised(values: list[dict[str, Any]], format: str, forms: str, how: str, template: str) -> Shard:
    source = SourceSection(path="f", format=how, template=forms if format == "template" else None)
    records = [(number, Record(value, "f", number + 1, 0)) for number, value in enumerate(values)]
    return tokenise(records, source, format, rules(template))


def test_there_is_a_record_of_every_format(forms: str) -> None:
    """That is good as it stands."""
    assert RECORDS.keys() == {*_SIGNATURES, "template"}
    for format, record in RECORDS.items():
        shard = tokenised([record], format, forms, format, "plain")
        assert len(shard.table), (format, shard.events)
        assert not shard.events


@pytest.mark.parametrize(
    ("format", "how", "template"),
    [
        *((name, name, "plain") for name in RECORDS),
        *((name, "auto", "chatml") for name in RECORDS if name in _SIGNATURES),
    ],
)
def test_each_junk_at_each_place_is_a_row_or_a_word(format: str, how: str, template: str, forms: str) -> None:
    record = RECORDS[format]
    values = [changed(record, path, junk) for path in paths(record) for junk in JUNK]
    shard = tokenised(values, format, forms, how, template)
    told = {event.record for event in shard.events} | set(shard.table["record"].to_pylist())
    assert told == set(range(len(values)))
    assert all(event.reason for event in shard.events)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), format=st.sampled_from(sorted(RECORDS)))
def test_several_pieces_of_junk_are_a_row_or_a_word(data: st.DataObject, format: str, forms: str) -> None:
    record = RECORDS[format]
    for _ in range(data.draw(st.integers(1, 3))):
        record = changed(record, data.draw(st.sampled_from(sorted(paths(record), key=str))), data.draw(VALUES))
    shard = tokenised([record], format, forms, format, "plain")
    assert len(shard.table) or shard.events
    json.dumps([event.reason for event in shard.events])
