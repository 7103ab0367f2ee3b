"""Records of the field's formats: each field, and everything that must be refused."""

from __future__ import annotations

from datetime import date
from typing import Any

import numpy as np
import pytest

from sft_dist.data.formats import detect_format, to_conversations
from sft_dist.data.records import Record
from sft_dist.errors import BadRecord
from sft_dist.types import Conversation, Message, TokenizedExample

Columns = dict[str, str | int] | None


def convert(value: dict[str, Any], format: str = "auto", columns: Columns = None) -> Conversation:
    (found,) = to_conversations(Record(value, "f.jsonl", 7, 120), format, columns or {})
    assert isinstance(found, Conversation)
    return found


def convert_all(value: dict[str, Any], format: str = "auto") -> list[Any]:
    return to_conversations(Record(value, "f.jsonl", 7, 120), format, {})


def said(value: dict[str, Any], format: str = "auto", columns: Columns = None) -> list[tuple[str, str]]:
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
    "prompt-messages-system": (
        "prompt_completion",
        {"system": "s", "prompt": PAIR[:1], "completion": PAIR[1:]},
        [("system", "s"), *QA],
    ),
    "prompt-messages": ("prompt_completion", {"prompt": PAIR[:1], "completion": PAIR[1:]}, QA),
    "question": ("question_answer", {"question": "q", "answer": "a"}, QA),
    "thoughts": (
        "chain_of_thought",
        {"question": "q", "answer": " a.", "rationale": "since\n"},
        [QA[0], ("assistant", "since\nThe answer is a.")],
    ),
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
    "label-beside-text": ({"text": "t", "label": 1}, "looks like a labelled record: format=template"),
    "one-message-of-a-tree": ({"message_id": "1", "parent_id": None, "text": "t"}, "one message of an Open Assistant"),
    "tokens-beside-messages": ({"messages": PAIR, "input_ids": [1]}, "fit messages and tokenized"),
    "rationale-beside-alpaca": ({"instruction": "q", "output": "a", "rationale": "r"}, "which has no 'rationale'"),
    "context-beside-question": ({"question": "q", "answer": "a", "context": "c"}, "which has no 'context'"),
    "choices": ({"question": "q", "answer": 1, "choices": ["a"]}, "which has no 'choices'"),
    "input-beside-dolly": (
        {"instruction": "q", "input": "i", "response": "a"},
        "look like dolly, which has no 'input'",
    ),
    "empty-messages": ({"messages": []}, "fit no known format"),
    "tools-beside-instances": (
        {"instruction": "q", "instances": [{"output": "a"}], "tools": [{"name": "f"}]},
        "look like self_instruct, which has no 'tools'",
    ),
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
    "empty-rationale": ("chain_of_thought", {"question": "q", "answer": "a", "rationale": ""}, "'rationale' is empty"),
    "no-instances": ("self_instruct", {"instruction": "q", "instances": []}, "'instances' is empty"),
    "instances-null": (
        "self_instruct",
        {"instruction": "q", "instances": None},
        "'instances' must be a list of instances",
    ),
    "instance-text": ("self_instruct", {"instruction": "q", "instances": ["a"]}, "an instance must be an object"),
    "instance-empty": (
        "self_instruct",
        {"instruction": "q", "instances": [{"output": "a"}, {"input": "i", "output": ""}]},
        "instance 2: field 'output' is empty",
    ),
    "instance-placeholder": (
        "self_instruct",
        {"instruction": "q", "instances": [{"output": "a"}, {"output": "{{name}}"}]},
        "instance 2: message 2 holds the placeholder",
    ),
    "no-definition": (
        "natural_instructions",
        {"Instances": [{"input": "i", "output": ["a"]}]},
        "'definition' is missing",
    ),
    "definition-of-numbers": ("natural_instructions", {"definition": [1], "output": "a"}, "'definition' must be text"),
    "no-outputs": ("natural_instructions", {"definition": "d", "input": "i", "output": []}, "field 'output' is empty"),
    "output-number": (
        "natural_instructions",
        {"definition": "d", "input": "i", "output": [1]},
        "must be text, it is a num",
    ),
    "no-tree": ("oasst", {"prompt": "q"}, "'prompt' must be a message with"),
    "tree-without-answer": ("oasst", {"prompt": {"role": "prompter", "text": "q", "replies": []}}, "no assistant turn"),
    "tree-role": ("oasst", {"prompt": {"role": "judge", "text": "q", "replies": []}}, "unknown role 'judge'"),
    "tree-replies": (
        "oasst",
        {"prompt": {"role": "prompter", "text": "q", "replies": ["a"]}},
        "'replies' must be a list",
    ),
    "tree-empty": (
        "oasst",
        {"prompt": {"role": "prompter", "text": "q", "replies": [{"role": "assistant", "text": " ", "replies": []}]}},
        "field 'text' is empty",
    ),
    "history-number": ("alpaca", {"instruction": "q", "output": "a", "history": 7}, "'history' must be a list of"),
    "history-true": ("alpaca", {"instruction": "q", "output": "a", "history": True}, "'history' must be a list of"),
    "history-text": ("alpaca", {"instruction": "q", "output": "a", "history": "ab"}, "'history' must be a list of"),
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
    "images-in-a-message": (
        "messages",
        turns({"role": "assistant", "content": "a", "images": ["x.jpg"]}),
        "message 2 is multimodal .field 'images'",
    ),
    "audio-in-a-message": (
        "messages",
        turns({"role": "assistant", "content": "a", "audio": {"id": "x"}}),
        "message 2 is multimodal .field 'audio'",
    ),
    "image-placeholder": (
        "messages",
        {"messages": [{"role": "user", "content": "<image>What is it?"}, PAIR[1]], "images": []},
        "multimodal record .<image> in a text beside the field 'images'",
    ),
    "placeholder": ("alpaca", {"instruction": "q", "output": "I am {{name}}."}, r"placeholder \{\{name\}\}"),
    "bad-weight": ("messages", turns({"role": "assistant", "content": "a", "weight": -1}), "weight must be a number"),
    "weights-disagree": (
        "messages",
        turns({"role": "assistant", "content": "a", "weight": 1, "train": False}),
        "message 2 says weight=1 and train=False, which disagree",
    ),
    "loss-weights-disagree": (
        "messages",
        turns({"role": "assistant", "content": "a", "weight": 0, "loss_weight": 0.5, "train": None}),
        "message 2 says weight=0 and loss_weight=0.5, which disagree",
    ),
    "two-systems-of-a-prompt": (
        "prompt_completion",
        {"prompt": [{"role": "system", "content": "s"}, PAIR[0]], "completion": PAIR[1:], "system": "t"},
        "two system prompts",
    ),
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
    "call-of-null": (
        "messages",
        turns({"role": "assistant", "tool_calls": [{"function": None}]}),
        "needs 'name'",
    ),
    "call-of-text": ("messages", turns({"role": "assistant", "tool_calls": [{"function": "f"}]}), "needs 'name'"),
    "two-kinds-of-calls": (
        "messages",
        turns({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}], "function_call": {"name": "f"}}),
        "message 2: both 'tool_calls' and 'function_call' are given",
    ),
    "call-of-a-user": (
        "messages",
        {"messages": [PAIR[0] | {"function_call": {"name": "f"}}, PAIR[1]]},
        "message 1 has a call under 'function_call', but is of the role 'user'",
    ),
    "call-beside-a-part": (
        "messages",
        turns(
            {
                "role": "assistant",
                "function_call": {"name": "f"},
                "content": [{"type": "tool_call", "value": {"name": "f"}}],
            }
        ),
        "message 2 has a call under 'function_call', but holds another one",
    ),
    "date-in-a-call": (
        "messages",
        turns(
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"on": date(2024, 1, 2)}}}]}
        ),
        "message 2: the arguments of 'f': Object of type date is not JSON serializable; write it as text",
    ),
    "date-in-a-tool": (
        "messages",
        {"messages": PAIR, "tools": [{"name": "f", "since": date(2024, 1, 2)}]},
        "field 'tools': Object of type date is not JSON",
    ),
    "tools-and-functions": (
        "messages",
        {"messages": PAIR, "tools": [{"name": "f"}], "functions": [{"name": "f"}]},
        "both 'tools' and 'functions' are given",
    ),
    "functions-not-a-list": ("messages", {"messages": PAIR, "functions": True}, "'functions' must be a list"),
    "role-is-a-list": ("messages", turns({"role": ["assistant"], "content": "a"}), "has the unknown role"),
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


def test_weights_that_agree_may_stand_side_by_side() -> None:
    answers = [PAIR[1] | given for given in ({"weight": 0, "train": False}, {"weight": 1.0, "loss_weight": 1},
                                             {"train": True, "weight": None})]  # fmt: skip
    assert [message.weight for message in convert({"messages": [PAIR[0], *answers]}).messages[1:]] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("name", [name for name in RECORDS if name != "text"])
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_functions_beside_a_record_are_carried(name: str, key: str) -> None:
    _, value, expected = RECORDS[name]
    found = convert(value | {key: [{"name": "f"}]})
    assert found.tools == ({"type": "function", "function": {"name": "f"}},)
    assert [(message.role, message.content) for message in found.messages] == expected


def test_tags_of_media_are_text_where_no_field_holds_media() -> None:
    assert said({"instruction": "What does <image> do?", "output": "<video> too"})[1][1] == "<video> too"


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
    spelled += [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "assistant", "function_call": {"name": "f", "arguments": {"x": 1}}, "tool_calls": []},
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


def test_an_older_call_stays_beside_its_text_and_before_its_answer() -> None:
    older = {"role": "assistant", "content": "a", "function_call": {"name": "f", "arguments": "{}"}}
    answer = {"role": "function", "name": "f", "content": "r"}
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert convert(turns(older, answer, PAIR[1])).messages[1:] == (
        Message("assistant", "a", extra={"tool_calls": [call]}),
        Message("tool", "r", extra={"name": "f"}),
        Message("assistant", "a"),
    )


def test_reasoning_goes_to_the_names_that_templates_read() -> None:
    extra = {"reasoning_content": "hm", "thinking": "hm"}
    part = {"role": "assistant", "content": [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "a"}]}
    for turn in (part, {"role": "assistant", "content": "a", "reasoning": "hm"}):
        assert convert(turns(turn)).messages[1] == Message("assistant", "a", extra=extra)


def test_thoughts_beside_an_answer_go_with_it() -> None:
    extra = {"reasoning_content": "hm", "thinking": "hm"}
    for value in (
        {"instruction": "q", "output": "a", "reasoning": "hm"},
        {"instruction": "q", "response": "a", "thinking": "hm"},
        {"question": "q", "answer": "a", "reasoning_content": "hm"},
        {"prompt": "q", "completion": "a", "reasoning_content": "hm"},
    ):
        assert convert(value).messages == (Message("user", "q"), Message("assistant", "a", extra=extra))


def test_each_instance_is_a_conversation() -> None:
    value = {
        "instruction": "q",
        "instances": [{"input": "i", "output": "a"}, {"input": "", "output": "b"}],
        "name": "x",
    }
    assert detect_format(value) == "self_instruct"
    found = convert_all(value)
    assert [[m.content for m in one.messages] for one in found] == [["q\n\ni", "a"], ["q", "b"]]
    assert [one.id for one in found] == ["f.jsonl:7#1", "f.jsonl:7#2"]
    assert found[0].messages[0].extra == {"instruction": "q", "input": "i"}
    value["instances"] = value["instances"][:1]  # type: ignore[index]
    assert [one.id for one in convert_all(value)] == ["f.jsonl:7"]


def test_a_task_file_of_natural_instructions() -> None:
    instances = [{"id": "t-1", "input": "x", "output": ["a", "b", "a"]}, {"id": "t-2", "input": "y", "output": ["c"]}]
    example = {"input": "p", "output": "p", "explanation": "e"}
    value = {
        "Contributors": ["n"],
        "Definition": ["In this task", "you answer."],
        "Positive Examples": [example],
        "Negative Examples": [example],
        "Instances": instances,
    }
    assert detect_format(value) == "natural_instructions"
    found = convert_all(value)
    question = "In this task\nyou answer.\n\n"
    assert [[m.content for m in one.messages] for one in found] == [
        [question + "x", "a"],
        [question + "x", "b"],
        [question + "y", "c"],
    ]
    assert [one.id.rpartition("#")[2] for one in found] == ["1", "2", "3"]


def test_a_bad_instance_spoils_itself_alone() -> None:
    outputs = [["a"], ["b", " "], ["c", "d"], [], "{{name}}", ["e"]]
    instances: list[Any] = [{"input": "i", "output": output} for output in outputs]
    record = Record({"Definition": "q", "Instances": [*instances, 7]}, "f.jsonl", 7, 120)
    reasons: list[str] = []
    found = to_conversations(record, "natural_instructions", {}, spoiled=reasons.append)
    assert [one.messages[1].content for one in found if isinstance(one, Conversation)] == ["a", "c", "d", "e"]
    assert [one.id for one in found] == [f"f.jsonl:7#{number}" for number in (1, 2, 3, 4)]
    assert [reason.partition(": ")[0] for reason in reasons] == [f"instance {number}" for number in (2, 4, 5, 7)]
    with pytest.raises(BadRecord, match="'Definition' is empty"):
        to_conversations(
            Record({"Definition": "", "Instances": instances}, "f", 1, 0), "auto", {}, spoiled=reasons.append
        )


def tree(role: str, text: str, *replies: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "text": text, "replies": list(replies), "message_id": text}


def test_a_tree_gives_its_threads_up_to_their_last_answer() -> None:
    value = {
        "message_tree_id": "t",
        "prompt": tree(
            "prompter",
            "q",
            tree("assistant", "a", tree("prompter", "more?", tree("assistant", "b")), tree("prompter", "bye")),
            tree("assistant", "c"),
            tree("prompter", "nobody?"),
        ),
    }
    assert detect_format(value) == "oasst"
    found = convert_all(value)
    assert [[m.content for m in one.messages] for one in found] == [["q", "a", "more?", "b"], ["q", "a"], ["q", "c"]]
    assert [m.role for m in found[0].messages] == ["user", "assistant"] * 2


def test_a_deep_tree_is_no_recursion() -> None:
    prompt = tree("assistant", "end")
    for number in range(5000):
        prompt = tree("prompter" if number % 2 == 0 else "assistant", "x", prompt)
    (found,) = convert_all({"prompt": prompt})
    assert len(found.messages) == 5001


TOKENS = {
    "labels": ({"labels": [-100, -100, 7, 8, -100, 9]}, [5, 6, 7, 8, 3, 9], [0, 0, 1, 1, 0, 1], ((2, 4), (5, 6))),
    "loss-weights": ({"loss_weights": [0, 0.5, 1, 1, 0, 0]}, [5, 6, 7, 8, 3, 9], [0, 0.5, 1, 1, 0, 0], ((1, 4),)),
    "mask-alone": ({"attention_mask": [1, 1, 1, 1, 0, 0]}, [5, 6, 7, 8], [1, 1, 1, 1], ((0, 4),)),
    "padded-on-the-left": (
        {"attention_mask": [0, 0, 1, 1, 1, 1], "labels": [5, 6, -100, 8, 3, 9]},
        [7, 8, 3, 9],
        [0, 1, 1, 1],
        ((1, 4),),
    ),
    "padding-with-any-label": (
        {"attention_mask": [1, 1, 1, 1, 1, 0], "labels": [-100, 6, -100, -100, -100, 0], "token_type_ids": [0] * 6},
        [5, 6, 7, 8, 3],
        [0, 1, 0, 0, 0],
        ((1, 2),),
    ),
}


@pytest.mark.parametrize("name", TOKENS)
def test_rows_that_are_tokens_already(name: str) -> None:
    beside, ids, weights, answers = TOKENS[name]
    value = {"input_ids": [5, 6, 7, 8, 3, 9], **beside}
    assert detect_format(value) == "tokenized"
    (found,) = convert_all(value)
    assert isinstance(found, TokenizedExample)
    assert (found.input_ids.dtype, found.loss_weights.dtype) == (np.int32, np.float32)
    assert (found.input_ids.tolist(), found.loss_weights.tolist(), found.answers) == (ids, weights, answers)
    assert (found.source, found.id) == ("f.jsonl", "f.jsonl:7")


BAD_TOKENS: dict[str, tuple[dict[str, Any], str]] = {
    "alone": ({"input_ids": [1, 2]}, "do not say what is learned"),
    "none": ({"input_ids": [], "labels": []}, "at least one"),
    "text": ({"input_ids": "1 2", "labels": [1]}, "'input_ids' must be a list of numbers, it is text"),
    "negative": ({"input_ids": [1, -2], "labels": [1, -2]}, "from 0 up"),
    "too-large": ({"input_ids": [1, 2**31], "labels": [1, 2]}, "from 0 up"),
    "enormous": ({"input_ids": [1, 2**70], "labels": [1, 2]}, "list of whole numbers"),
    "fractions": ({"input_ids": [1.5, 2.0], "labels": [1, 2]}, "list of whole numbers"),
    "truths": ({"input_ids": [True, False], "labels": [1, 0]}, "list of whole numbers"),
    "nested": ({"input_ids": [[1, 2]], "labels": [1]}, "list of whole numbers"),
    "ragged": ({"input_ids": [[1], [1, 2]], "labels": [1]}, "list of whole numbers"),
    "lengths": ({"input_ids": [1, 2], "labels": [1]}, "'labels' has 1 items, 'input_ids' 2"),
    "shifted": ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "label 0 is 2, its token is 1: .*not shifted"),
    "both": ({"input_ids": [1], "labels": [1], "loss_weights": [1]}, "keep one"),
    "below-zero": ({"input_ids": [1], "loss_weights": [-1]}, "numbers from 0 to 1,000,000"),
    "infinite": ({"input_ids": [1], "loss_weights": [float("inf")]}, "numbers from 0 to 1,000,000"),
    "holes": ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "one run of tokens"),
    "no-token": ({"input_ids": [1], "attention_mask": [0]}, "one run of tokens"),
    "other-mask": ({"input_ids": [1], "attention_mask": [2]}, "one run of tokens"),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_tokens_that_cannot_be_used(name: str) -> None:
    value, reason = BAD_TOKENS[name]
    with pytest.raises(BadRecord, match=reason) as caught:
        convert_all(value)
    assert str(caught.value).startswith("f.jsonl:7 (byte 120): ")
