"""Records of the field's formats: real files, each field, and everything that must be refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sft_dist.data.formats import detect_format, to_conversation
from sft_dist.data.sources import Record, Rejects, read_records
from sft_dist.errors import BadRecord
from sft_dist.types import Conversation, Message


def convert(value: dict[str, Any], format: str = "auto", columns: dict[str, str] | None = None) -> Conversation:
    return to_conversation(Record(value, "f.jsonl", 7, 120), format, columns or {})


def said(value: dict[str, Any], format: str = "auto", columns: dict[str, str] | None = None) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in convert(value, format, columns).messages]


QA = [("user", "q"), ("assistant", "a")]
PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]

RECORDS: dict[str, tuple[str, dict[str, Any], list[tuple[str, str]]]] = {
    "alpaca": ("alpaca", {"instruction": "q", "input": "", "output": "a"}, QA),
    "alpaca-no-input": ("alpaca", {"instruction": "q", "output": "a"}, QA),
    "alpaca-input": ("alpaca", {"instruction": "q", "input": "i", "output": "a"}, [("user", "q\n\ni"), QA[1]]),
    "alpaca-more": (
        "alpaca",
        {"instruction": "q", "output": "a", "system": "s", "history": [["x", "y"]], "text": "all of it", "id": 3},
        [("system", "s"), ("user", "x"), ("assistant", "y"), *QA],
    ),
    "dolly": (
        "dolly",
        {"instruction": "q", "context": "c", "response": "a", "category": "x"},
        [("user", "q\n\nc"), QA[1]],
    ),
    "prompt": ("prompt_completion", {"prompt": "q", "completion": "a"}, QA),
    "prompt-response": ("prompt_completion", {"prompt": "q", "response": "a"}, QA),
    "prompt-messages": ("prompt_completion", {"prompt": PAIR[:1], "completion": PAIR[1:]}, QA),
    "question": ("question_answer", {"question": "q", "answer": "a"}, QA),
    "text": ("text", {"text": "t", "url": "u", "timestamp": "x"}, [("text", "t")]),
    "messages": ("messages", {"messages": PAIR, "id": 1}, QA),
    "messages-in-conversations": ("messages", {"conversations": PAIR}, QA),
    "sharegpt": ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA),
    "sharegpt-system": (
        "sharegpt",
        {"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        [("system", "s"), *QA],
    ),
    "typed-parts": (
        "messages",
        {"messages": [PAIR[0], {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
        QA,
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_detected_and_read(name: str) -> None:
    format, value, expected = RECORDS[name]
    assert detect_format(value) == format
    assert said(value) == said(value, format) == expected
    assert (convert(value).source, convert(value).id) == ("f.jsonl", "f.jsonl:7")


def test_instruction_and_input_stay_apart_for_templates_that_want_them() -> None:
    task = convert(RECORDS["alpaca-input"][1]).messages[0]
    assert task.extra == {"instruction": "q", "input": "i"}


UNDECIDED = {
    "nothing": ({}, "fit no known format"),
    "unknown": ({"foo": 1}, r"fields \(foo\) fit no known format"),
    "two-formats": ({"messages": PAIR, "prompt": "q", "completion": "a"}, "fit messages and prompt_completion"),
    "preference": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference data"),
    "instances": ({"instruction": "q", "instances": []}, "nested instances"),
    "tokenized": ({"input_ids": [1], "labels": [1]}, "tokenized data"),
    "label-beside-text": ({"text": "t", "label": 1}, "fit no known format"),
    "context-beside-question": ({"question": "q", "answer": "a", "context": "c"}, "which has no 'context'"),
    "choices": ({"question": "q", "answer": 1, "choices": ["a"]}, "which has no 'choices'"),
    "input-beside-dolly": (
        {"instruction": "q", "input": "i", "response": "a"},
        "look like dolly, which has no 'input'",
    ),
    "empty-messages": ({"messages": []}, "fit no known format"),
}


@pytest.mark.parametrize("name", UNDECIDED)
def test_a_format_is_never_guessed(name: str) -> None:
    value, reason = UNDECIDED[name]
    with pytest.raises(BadRecord, match=reason):
        detect_format(value)
    with pytest.raises(BadRecord, match=reason) as caught:
        convert(value)
    assert (caught.value.file, caught.value.line, caught.value.byte) == ("f.jsonl", 7, 120)


def turns(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [PAIR[0], *messages]}


REFUSED = {
    "missing-output": ("alpaca", {"instruction": "q"}, "field 'output' is missing; the record has instruction"),
    "empty-output": ("alpaca", {"instruction": "q", "output": " \n"}, "field 'output' is empty"),
    "null-instruction": ("alpaca", {"instruction": None, "output": "a"}, "'instruction' must be text, it is null"),
    "output-list": ("alpaca", {"instruction": "q", "output": ["a"]}, "'output' must be text, it is an array"),
    "number-answer": ("question_answer", {"question": "q", "answer": 3}, "must be text, it is a number"),
    "bad-history": ("alpaca", {"instruction": "q", "output": "a", "history": ["x"]}, "history"),
    "no-messages": ("messages", {"messages": []}, "must be a list of messages, it is empty"),
    "messages-text": ("messages", {"messages": "hi"}, "must be a list of messages, it is text"),
    "not-a-message": ("messages", turns("hi"), "message 2 must be an object"),  # type: ignore[arg-type]
    "unknown-role": ("messages", turns({"role": "wizard", "content": "a"}), "message 2 has the unknown role 'wizard'"),
    "no-role": ("messages", turns({"content": "a"}), "message 2 must be an object with 'role'"),
    "no-content": ("messages", turns({"role": "assistant"}), r"message 2 \(assistant\) has no 'content'"),
    "number-content": ("messages", turns({"role": "assistant", "content": 3}), "message 2: content must be text"),
    "empty-answer": ("messages", turns({"role": "assistant", "content": ""}), r"message 2 \(assistant\) is empty"),
    "no-answer": ("messages", turns(), "no assistant turn"),
    "image-part": ("messages", turns({"role": "assistant", "content": [{"type": "image"}]}), "of type 'image'"),
    "images": ("messages", {"messages": PAIR, "images": ["x.jpg"]}, "multimodal record"),
    "placeholder": ("alpaca", {"instruction": "q", "output": "I am {{name}}."}, r"placeholder \{\{name\}\}"),
    "bad-weight": ("messages", turns({"role": "assistant", "content": "a", "weight": -1}), "weight must be a number"),
    "two-systems": (
        "messages",
        {"messages": [{"role": "system", "content": "s"}, *PAIR], "system": "t"},
        "two system prompts",
    ),
    "call-not-json": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f(x)"}]},
        "message 2: the function call is not JSON",
    ),
    "call-without-name": (
        "messages",
        turns({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}),
        "needs 'name'",
    ),
    "tools-not-json": ("messages", {"messages": PAIR, "tools": "[{"}, "'tools' is not JSON"),
    "tools-not-a-list": ("messages", {"messages": PAIR, "tools": {"name": "f"}}, "'tools' must be a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_place_and_reason(name: str) -> None:
    format, value, reason = REFUSED[name]
    with pytest.raises(BadRecord, match=reason) as caught:
        convert(value, format)
    assert str(caught.value).startswith("f.jsonl:7 (byte 120): ")


def test_braces_of_code_are_no_placeholders() -> None:
    assert said({"instruction": "q", "output": "<b>{{ user.name }}</b> {{x}}"})[1][1] == "<b>{{ user.name }}</b> {{x}}"


def test_columns_rename_fields() -> None:
    value = {"definition": "q", "target": "a", "output": ["other"]}
    assert said(value, "alpaca", {"instruction": "definition", "output": "target"}) == QA
    with pytest.raises(BadRecord, match="the record has no field 'goal'"):
        said(value, "alpaca", {"output": "goal"})


def test_weights_under_all_their_names() -> None:
    answers = [{"role": "assistant", "content": "a", key: given} for key, given in
               [("weight", 0), ("loss_weight", 0.5), ("train", True), ("train", False), ("weight", None)]]  # fmt: skip
    weights = [message.weight for message in convert({"messages": [PAIR[0], *answers]}).messages]
    assert weights == [None, 0.0, 0.5, 1.0, 0.0, None]


def test_of_a_prompt_in_messages_only_the_completion_is_learned() -> None:
    value = {"prompt": [*PAIR, PAIR[0]], "completion": [PAIR[1]]}
    assert [message.weight for message in convert(value).messages] == [None, 0.0, None, None]


def test_function_calls_in_every_spelling_are_the_same() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    spelled = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]},
    ]
    for turn in spelled:
        assert convert(turns(turn)).messages[1] == Message("assistant", "", extra={"tool_calls": [call]})
    shared_gpt = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ]
    observed = {"from": "observation", "value": "r"}
    converted = convert({"conversations": [*shared_gpt, observed], "tools": '[{"name": "f"}]'})
    assert converted.messages[1:] == (Message("assistant", "", extra={"tool_calls": [call]}), Message("tool", "r"))
    assert converted.tools == ({"type": "function", "function": {"name": "f"}},)


def test_reasoning_goes_to_the_names_that_templates_read() -> None:
    extra = {"reasoning_content": "hm", "thinking": "hm"}
    part = {"role": "assistant", "content": [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "a"}]}
    for turn in (part, {"role": "assistant", "content": "a", "reasoning": "hm"}):
        assert convert(turns(turn)).messages[1] == Message("assistant", "a", extra=extra)


REAL = {
    "rasbt_instruction_data.json": ("alpaca", 1100, {}),
    "rasbt_instruction_data_with_preference.json": ("alpaca", 1100, {}),
    "lf_glaive_toolcall_en_demo.json": ("sharegpt", 300, {}),
    "lf_v1_sft_demo.jsonl": ("messages", 450, {"placeholder": 50}),
    "lf_reason_tool_use_demo_50.jsonl": ("messages", 50, {}),
    "pt_mt_bench_messages.jsonl": ("messages", 80, {}),
    "fastchat_dummy_conversation.json": ("sharegpt", 500, {}),
    "alpaca_subset.json.gz": ("alpaca", 17378, {"field 'output' is empty": 9}),
    "alpaca_random_9k.json.gz": ("alpaca", 9225, {"field 'output' is empty": 4}),
    "lf_mllm_demo.json": ("messages", 0, {"multimodal": 6}),
    "lf_identity.json": ("alpaca", 6, {"placeholder": 85}),
    "lf_alpaca_zh_demo.json": ("alpaca", 1000, {}),
    "gsm8k_train.jsonl.gz": ("question_answer", 7473, {}),
    "p3_t0_16per_template.jsonl.gz": ("prompt_completion", 4480, {}),
    "code_alpaca_2k.json": ("alpaca", 2015, {"field 'output' is empty": 2}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(shared: Path, name: str) -> None:
    format, num_good, refused = REAL[name]
    good, reasons, formats, ids = 0, Counter[str](), set(), set()
    for record in read_records(str(shared / "data/instruct" / name), Rejects()):
        ids.add(record.id)
        formats.add(detect_format(record.value))
        try:
            good += bool(to_conversation(record, "auto", {}).messages)
        except BadRecord as error:
            reasons[next((key for key in refused if key in error.reason), error.reason)] += 1
    assert (formats, good, dict(reasons)) == ({format}, num_good, refused)
    assert len(ids) == num_good + sum(refused.values())


@pytest.mark.parametrize(
    "name",
    ["alpaca_seed_tasks.jsonl", "oasst_en_100_tree.jsonl", "natural_instructions_v2_60per.jsonl.gz"],
)
def test_real_files_of_other_kinds_are_refused(shared: Path, name: str) -> None:
    for record in read_records(str(shared / "data/instruct" / name), Rejects()):
        with pytest.raises(BadRecord, match="no known format"):
            detect_format(record.value)
