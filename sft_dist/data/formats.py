"""Records in the field's data formats into conversations.

    messages            messages: [{role, content, tool_calls?, weight? | train? | loss_weight?}], tools?
    sharegpt            conversations: [{from: human | gpt | ..., value}], system?, tools?
    alpaca              instruction, input?, output, system?, history?
    dolly               instruction, context?, response
    prompt_completion   prompt, completion | response (texts, or lists of messages)
    question_answer     question, answer
    text                text, learned whole and without a template

`detect_format` names the one format a record fits, and refuses when none or several do: a guess is never silent.
What cannot be trained on as text (images, unfilled placeholders, empty answers, conversations without an answer) is a
BadRecord with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sft_dist.data.messages import read_messages, read_tools
from sft_dist.data.sources import Record
from sft_dist.data.strict_json import kind_of
from sft_dist.errors import BadRecord
from sft_dist.types import Conversation, Message

Value = Mapping[str, Any]
Turns = tuple[list[Message], Sequence[Any]]  # messages, tools

_CONVERSATION_KEYS = ("messages", "conversations", "conversation")
_MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")
_ABOUT_TEXT = {"id", "meta", "metadata", "source", "url", "title", "date", "timestamp", "lang", "language", "license"}
_PLACEHOLDER = re.compile(r"\{\{(?:name|author)\}\}")  # as in LLaMA-Factory's identity set; other braces may be code


def detect_format(record: Mapping[str, Any]) -> str:
    """The one format that fits the fields of `record`.

    Raises BadRecord when none or several fit, or when the one that fits would drop a field that looks like input.
    """
    fits = [name for name, signature in _SIGNATURES.items() if signature(record)]
    found = ", ".join(sorted(map(str, record))) or "no fields"
    if not fits:
        raise BadRecord(f"fields ({found}) fit no known format{_hint(record)}; set format= and columns= of the source")
    if len(fits) > 1:
        raise BadRecord(f"fields ({found}) fit {' and '.join(fits)}: say which with format= of the source")
    dropped = [key for key in sorted(_INPUTS - _READ[fits[0]]) if record.get(key)]
    if dropped:
        raise BadRecord(
            f"fields ({found}) look like {fits[0]}, which has no {dropped[0]!r}: "
            f"set format={fits[0]} of the source to leave it out, or columns= to use it"
        )
    return fits[0]


def to_conversation(record: Record, format: str, columns: Mapping[str, str]) -> Conversation:
    """The conversation a record stands for.

    `format` is a name of the table above or "auto" (detected for this record); `columns` maps our field names to the
    record's. Raises BadRecord with the place and the reason.
    """
    try:
        value = rename_columns(record.value, columns)
        _refuse_media(value)
        messages, tools = _READERS[detect_format(value) if format == "auto" else format](value)
        _check(messages)
        return Conversation(tuple(messages), tuple(tools), record.file, record.id)
    except BadRecord as error:
        raise record.bad(error.reason) from None


def rename_columns(value: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """`value` with the fields that `columns` (ours -> theirs) names under our names."""
    for ours, theirs in columns.items():
        if theirs not in value:
            raise BadRecord(f"columns: {ours}={theirs}, but the record has no field {theirs!r}")
    taken = set(columns.values())
    rest = {key: item for key, item in value.items() if key not in taken and key not in columns}
    return rest | {ours: value[theirs] for ours, theirs in columns.items()}


def _hint(value: Value) -> str:
    if {"chosen", "rejected"} <= value.keys():
        return " (it looks like preference data, which has no single answer)"
    if "instances" in value:
        return " (nested instances are not read in this version: write one record for each)"
    if "input_ids" in value:
        return " (tokenized data are not read in this version: give the text)"
    return ""


def _has(*keys: str) -> Callable[[Value], bool]:
    return lambda value: all(key in value for key in keys)


def _turns_of(value: Value, key: str) -> bool:
    for name in _CONVERSATION_KEYS:
        turns = value.get(name)
        if isinstance(turns, list) and turns:
            return all(isinstance(turn, Mapping) and key in turn for turn in turns)
    return False


def _is_plain_text(value: Value) -> bool:
    """Only a text, and what is known to be about it; a label, say, would make it another task."""
    return isinstance(value.get("text"), str) and not value.keys() - {"text"} - _ABOUT_TEXT


_SIGNATURES: dict[str, Callable[[Value], bool]] = {
    "messages": lambda value: _turns_of(value, "role"),
    "sharegpt": lambda value: _turns_of(value, "from"),
    "alpaca": _has("instruction", "output"),
    "dolly": _has("instruction", "response"),
    "prompt_completion": lambda value: "prompt" in value and ("completion" in value or "response" in value),
    "question_answer": _has("question", "answer"),
    "text": _is_plain_text,
}
# Fields that hold a part of the question, and those of them that each format reads.
_INPUTS = {"input", "context", "passage", "choices", "options", "system", "system_prompt", "history"}
_READ: dict[str, set[str]] = {
    "messages": {"system"},
    "sharegpt": {"system"},
    "alpaca": {"input", "system", "history"},
    "dolly": {"context"},
    "prompt_completion": {"system"},
    "question_answer": {"system"},
    "text": set(),
}


def _text(value: Value, key: str, *, optional: bool = False) -> str:
    """The string `value[key]`; required ones must not be blank."""
    text = value.get(key)
    if text is None and optional:
        return ""
    if key not in value:
        raise BadRecord(f"field {key!r} is missing; the record has {', '.join(sorted(map(str, value))) or 'no fields'}")
    if not isinstance(text, str):
        raise BadRecord(f"field {key!r} must be text, it is {kind_of(text)}")
    if not optional and not text.strip():
        raise BadRecord(f"field {key!r} is empty")
    return text


def _read_alpaca(value: Value) -> Turns:
    task = _task(_text(value, "instruction"), _text(value, "input", optional=True))
    answer = Message("assistant", _text(value, "output"))
    return [*_system(value), *_history(value), task, answer], read_tools(value.get("tools"))


def _history(value: Value) -> list[Message]:
    """Earlier turns beside an Alpaca record, as LLaMA-Factory writes them."""
    messages = []
    for pair in value.get("history") or []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise BadRecord("field 'history' must be a list of [instruction, response] texts")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


def _read_dolly(value: Value) -> Turns:
    task = _task(_text(value, "instruction"), _text(value, "context", optional=True))
    return [task, Message("assistant", _text(value, "response"))], ()


def _task(instruction: str, given: str) -> Message:
    """An instruction with its input; templates that tell them apart find both beside the joined content."""
    if not given.strip():
        return Message("user", instruction)
    return Message("user", f"{instruction}\n\n{given}", extra={"instruction": instruction, "input": given})


def _read_question_answer(value: Value) -> Turns:
    asked, answered = Message("user", _text(value, "question")), Message("assistant", _text(value, "answer"))
    return [*_system(value), asked, answered], ()


def _read_prompt_completion(value: Value) -> Turns:
    """Two texts, or two lists of messages of which only the completion is learned."""
    answer_key = "completion" if "completion" in value else "response"
    prompt, answer = value.get("prompt"), value.get(answer_key)
    if isinstance(prompt, list) and isinstance(answer, list):
        asked = [_muted(message) for message in read_messages(prompt, "role", "content")]
        return [*asked, *read_messages(answer, "role", "content")], read_tools(value.get("tools"))
    texts = Message("user", _text(value, "prompt")), Message("assistant", _text(value, answer_key))
    return [*_system(value), *texts], read_tools(value.get("tools"))


def _muted(message: Message) -> Message:
    weight = 0.0 if message.role == "assistant" else message.weight
    return Message(message.role, message.content, weight, message.extra)


def _read_text(value: Value) -> Turns:
    return [Message("text", _text(value, "text"))], ()


def _read_messages(value: Value) -> Turns:
    return _conversation(value, "role", "content")


def _read_sharegpt(value: Value) -> Turns:
    return _conversation(value, "from", "value")


def _conversation(value: Value, role_key: str, content_key: str) -> Turns:
    system, messages = _system(value), read_messages(_turns(value), role_key, content_key)
    if system and any(message.role == "system" for message in messages):
        raise BadRecord("two system prompts: the field 'system' and a system message")
    return [*system, *messages], read_tools(value.get("tools"))


def _system(value: Value) -> list[Message]:
    system = _text(value, "system", optional=True)
    return [Message("system", system)] if system.strip() else []


def _turns(value: Value) -> list[Any]:
    key = next((name for name in _CONVERSATION_KEYS if name in value), "messages")
    turns = value.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f"field {key!r} must be a list of messages, it is {kind_of(turns) if turns != [] else 'empty'}")
    return turns


def _refuse_media(value: Value) -> None:
    held = [key for key in _MEDIA_KEYS if value.get(key)]
    if held:
        raise BadRecord(f"multimodal record (field {held[0]!r}): only text is trained on")


def _check(messages: Sequence[Message]) -> None:
    """Something to learn, all of it written out."""
    for number, message in enumerate(messages, 1):
        if found := _PLACEHOLDER.search(message.content):
            raise BadRecord(f"message {number} holds the placeholder {found[0]}: put a real name there first")
        answers = message.role in ("assistant", "text") and message.weight != 0
        if answers and not message.content.strip() and not message.extra.get("tool_calls"):
            raise BadRecord(f"message {number} ({message.role}) is empty: there is nothing to learn")
    if not any(message.role in ("assistant", "text") for message in messages):
        raise BadRecord("no assistant turn: there is nothing to learn")


_READERS: dict[str, Callable[[Value], Turns]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "dolly": _read_dolly,
    "prompt_completion": _read_prompt_completion,
    "question_answer": _read_question_answer,
    "text": _read_text,
}
