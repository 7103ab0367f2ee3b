"""Records in the field's data formats into conversations.

    messages              messages: [{role, content, tool_calls? | function_call?, weight? | train? | loss_weight?}]
    sharegpt              conversations: [{from: human | gpt | ..., value}], system?
    alpaca                instruction, input?, output, system?, history?
    dolly                 instruction, context?, response
    prompt_completion     prompt, completion | response (texts, or lists of messages)
    question_answer       question, answer
    chain_of_thought      question, rationale, answer: the assistant thinks aloud, then "The answer is ..."
    self_instruct         instruction, instances: [{input?, output}]
    natural_instructions  Definition, Instances; or definition, input, output
    oasst                 prompt: {role, text, replies}: one conversation for each leaf
    tokenized             input_ids, labels | loss_weights | attention_mask
    text                  text, learned whole and without a template

Beside the first seven stand `tools` or `functions`, the definitions of what may be called.
`detect_format` names the one format a record fits, and refuses when none or several do: a guess is never silent.
`format: template` is never guessed: a file of forms (`forms`) says how a labelled record asks and answers.
What cannot be trained on as text (images, unfilled placeholders, empty answers, conversations without an answer) is a
BadRecord with the reason. Thoughts beside an answer (`reasoning_content`, `thinking`, `reasoning`) go with its message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sft_dist.data.fields import Turns, Value, task_message, text_field
from sft_dist.data.forms import Forms
from sft_dist.data.messages import MEDIA_KEYS, read_messages, reasoning_of, tools_of
from sft_dist.data.records import Record
from sft_dist.data.strict_json import kind_of
from sft_dist.data.task_files import TASKS, is_natural_instructions, is_self_instruct, read_instance
from sft_dist.data.tokenized import is_tokenized, read_tokenized
from sft_dist.data.trees import is_tree, read_tree
from sft_dist.errors import BadRecord
from sft_dist.types import Conversation, Message, TokenizedExample

_CONVERSATION_KEYS = ("messages", "conversations", "conversation")
_ABOUT_TEXT = {"id", "meta", "metadata", "source", "url", "title", "date", "timestamp", "lang", "language", "license"}
_PLACEHOLDER = re.compile(r"\{\{(?:name|author)\}\}")  # as in LLaMA-Factory's identity set; other braces may be code
_MEDIA_PLACEHOLDER = re.compile(r"<(?:image|video|audio)>")  # as in LLaVA's and LLaMA-Factory's sets


def detect_format(record: Mapping[str, Any]) -> str:
    """The one format that fits the fields of `record`.

    Raises BadRecord when none or several fit, or when the one that fits would drop a field that looks like input.
    """
    fits = [name for name, signature in _SIGNATURES.items() if signature(record)]
    if len(fits) == 1 and not any(map(record.get, _UNREAD[fits[0]])):
        return fits[0]
    found = ", ".join(sorted(map(str, record))) or "no fields"
    if not fits:
        raise BadRecord(f"fields ({found}) fit no known format{_hint(record)}; set format= and columns= of the source")
    if len(fits) > 1:
        raise BadRecord(f"fields ({found}) fit {' and '.join(fits)}: say which with format= of the source")
    dropped = next(key for key in _UNREAD[fits[0]] if record.get(key))
    raise BadRecord(
        f"fields ({found}) look like {fits[0]}, which has no {dropped!r}: "
        f"set format={fits[0]} of the source to leave it out, or columns= to use it"
    )


def _refuse(reason: str) -> None:
    raise BadRecord(reason)


def to_conversations(
    record: Record,
    format: str,
    columns: Mapping[str, str | int],
    forms: Forms | None = None,
    skipped: Callable[[str], None] = lambda reason: None,
    spoiled: Callable[[str], None] = _refuse,
) -> list[Conversation | TokenizedExample]:
    """What a record stands for: at least one conversation, or one example of tokens that somebody else made.

    `format` is a name of the table above, "template" (then `forms` must be given) or "auto" (detected for this record);
    `columns` maps our field names to the record's. The only conversation has the record's id, the k-th of several
    `file:line#k`, counted from 1. `skipped` gets the reason for each form that leaves this record out, `spoiled` what
    is wrong with each bad instance of a task, whose others are read: if all are bad, nothing is. Raises BadRecord with
    the place and the reason when any other part of the record cannot be used, and for a bad instance if nobody takes
    its reason.
    """
    try:
        value = rename_columns(record.value, columns)
        _refuse_media(value)
        format = detect_format(value) if format == "auto" else format
        if format == "tokenized":
            return [read_tokenized(value, record.file, record.id)]
        if format == "template":
            assert forms is not None, "format: template comes with its forms"
            found = _checked(value, forms.conversations(value, skipped))
        elif format in TASKS:
            found = list(_read_task(*TASKS[format](value), value, spoiled))
        else:
            found = _checked(value, _READERS[format](value))
    except BadRecord as error:
        raise record.bad(error.reason) from None
    ids = [record.id] if len(found) == 1 else [f"{record.id}#{number}" for number in range(1, len(found) + 1)]
    return [Conversation(tuple(m), tuple(t), record.file, id) for (m, t), id in zip(found, ids, strict=True)]


def _read_task(
    instruction: str, instances: Sequence[Any], value: Value, spoiled: Callable[[str], None]
) -> Iterator[Turns]:
    """The conversations of all good instances."""
    for number, instance in enumerate(instances, 1):
        try:
            yield from _checked(value, read_instance(instruction, instance))
        except BadRecord as error:
            spoiled(f"instance {number}: {error.reason}" if len(instances) > 1 else error.reason)


def fits(format: str, value: Value) -> bool:
    """Whether a record has the fields by which `format` is recognised."""
    return format in _SIGNATURES and _SIGNATURES[format](value)


def rename_columns(value: Value, columns: Mapping[str, str | int]) -> Value:
    """`value` with the fields that `columns` (ours -> theirs) names under our names."""
    if not columns:
        return value
    names = {ours: str(theirs) for ours, theirs in columns.items()}
    for ours, theirs in names.items():
        if theirs not in value:
            raise BadRecord(f"columns: {ours}={theirs}, but the record has no field {theirs!r}")
    taken = set(names.values())
    rest = {key: item for key, item in value.items() if key not in taken and key not in names}
    return rest | {ours: value[theirs] for ours, theirs in names.items()}


def _hint(value: Value) -> str:
    if {"chosen", "rejected"} <= value.keys():
        return " (it looks like preference data, which has no single answer)"
    if {"message_id", "parent_id"} <= value.keys():
        return " (it looks like one message of an Open Assistant export: use the file of whole trees)"
    if {"label", "labels"} & value.keys():
        return " (it looks like a labelled record: format=template with a file of forms makes instructions of it)"
    return ""


def _has(*keys: str) -> Callable[[Value], bool]:
    wanted = frozenset(keys)
    return lambda value: wanted <= value.keys()


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
    "question_answer": lambda value: {"question", "answer"} <= value.keys() and "rationale" not in value,
    "chain_of_thought": _has("question", "rationale", "answer"),
    "self_instruct": is_self_instruct,
    "natural_instructions": is_natural_instructions,
    "oasst": is_tree,
    "tokenized": is_tokenized,
    "text": _is_plain_text,
}
# Fields that hold a part of the question, and those of them that each format reads.
_INPUTS = {"input", "context", "rationale", "passage", "choices", "options", "system", "system_prompt", "history",
           "tools", "functions"}  # fmt: skip
_READ: dict[str, set[str]] = {
    "messages": {"system", "tools", "functions"},
    "sharegpt": {"system", "tools", "functions"},
    "alpaca": {"input", "system", "history", "tools", "functions"},
    "dolly": {"context", "tools", "functions"},
    "prompt_completion": {"system", "tools", "functions"},
    "question_answer": {"system", "tools", "functions"},
    "chain_of_thought": {"rationale", "system", "tools", "functions"},
    "self_instruct": set(),
    "natural_instructions": {"input"},
    "oasst": set(),
    "tokenized": set(),
    "text": set(),
}
_UNREAD = {name: sorted(_INPUTS - read) for name, read in _READ.items()}


def _read_alpaca(value: Value) -> list[Message]:
    task = task_message(text_field(value, "instruction"), text_field(value, "input", optional=True))
    return [*_system(value), *_history(value), task, _answer(value, "output")]


def _history(value: Value) -> list[Message]:
    """Earlier turns beside an Alpaca record, as LLaMA-Factory writes them."""
    messages = []
    pairs = value.get("history") or []
    for pair in pairs if isinstance(pairs, list) else [None]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise BadRecord("field 'history' must be a list of [instruction, response] texts")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


def _read_dolly(value: Value) -> list[Message]:
    task = task_message(text_field(value, "instruction"), text_field(value, "context", optional=True))
    return [task, _answer(value, "response")]


def _answer(value: Value, key: str) -> Message:
    """The assistant's turn, with the thoughts that stand beside it."""
    return Message("assistant", text_field(value, key), extra=reasoning_of(value))


def _read_question_answer(value: Value) -> list[Message]:
    return [*_system(value), Message("user", text_field(value, "question")), _answer(value, "answer")]


def _read_chain_of_thought(value: Value) -> list[Message]:
    """The rationale, then the answer in the words of Wei et al. (2022, "Chain-of-thought prompting")."""
    rationale, answer = text_field(value, "rationale").rstrip(), text_field(value, "answer").strip()
    said = Message("assistant", f"{rationale}\nThe answer is {answer.removesuffix('.')}.")
    return [*_system(value), Message("user", text_field(value, "question")), said]


def _read_prompt_completion(value: Value) -> list[Message]:
    """Two texts, or two lists of messages of which only the completion is learned."""
    answer_key = "completion" if "completion" in value else "response"
    prompt, answer = value.get("prompt"), value.get(answer_key)
    if isinstance(prompt, list) and isinstance(answer, list):
        asked = [_muted(message) for message in read_messages(prompt, "role", "content")]
        return _behind_system(value, [*asked, *read_messages(answer, "role", "content")])
    return [*_system(value), Message("user", text_field(value, "prompt")), _answer(value, answer_key)]


def _muted(message: Message) -> Message:
    weight = 0.0 if message.role == "assistant" else message.weight
    return Message(message.role, message.content, weight, message.extra)


def _read_text(value: Value) -> Iterable[Turns]:
    return [([Message("text", text_field(value, "text"))], ())]


def _read_messages(value: Value) -> list[Message]:
    return _behind_system(value, read_messages(_turns(value), "role", "content"))


def _read_sharegpt(value: Value) -> list[Message]:
    return _behind_system(value, read_messages(_turns(value), "from", "value"))


def _behind_system(value: Value, messages: list[Message]) -> list[Message]:
    """`messages` behind the system prompt that stands beside them."""
    system = _system(value)
    if system and any(message.role == "system" for message in messages):
        raise BadRecord("two system prompts: the field 'system' and a system message")
    return [*system, *messages]


def _system(value: Value) -> list[Message]:
    system = text_field(value, "system", optional=True)
    return [Message("system", system)] if system.strip() else []


def _turns(value: Value) -> list[Any]:
    held = [name for name in _CONVERSATION_KEYS if value.get(name) is not None]
    if len(held) > 1:
        raise BadRecord(f"fields {' and '.join(map(repr, held))} each hold a conversation: keep one")
    key = held[0] if held else "messages"
    turns = value.get(key)
    if key not in value:
        raise BadRecord(f"field {key!r} is missing; the record has {', '.join(sorted(map(str, value))) or 'no fields'}")
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f"field {key!r} must be a list of messages, it is {kind_of(turns) if turns != [] else 'empty'}")
    return turns


def _refuse_media(value: Value) -> None:
    held = [key for key in MEDIA_KEYS if value.get(key)]
    if held:
        raise BadRecord(f"multimodal record (field {held[0]!r}): only text is trained on")


def _refuse_placeholders(value: Value, messages: Iterable[Message]) -> None:
    """Of a record that has a field for images, `<image>` in a text stands for one, also where the field is empty.
    Other records may speak of such tags."""
    field = next((key for key in MEDIA_KEYS if key in value), None)
    found = next((found for m in messages if field and (found := _MEDIA_PLACEHOLDER.search(m.content))), None)
    if found:
        raise BadRecord(f"multimodal record ({found[0]} in a text beside the field {field!r}): only text is trained on")


def _checked(value: Value, given: Iterable[Turns]) -> list[Turns]:
    """The conversations that were read of `value`, all of which can be trained on."""
    found = list(given)
    if not found:
        raise BadRecord("no assistant turn: there is nothing to learn")
    for number, (messages, _) in enumerate(found, 1):
        try:
            _check(messages)
            _refuse_placeholders(value, messages)
        except BadRecord as error:
            where = f"conversation {number}: " if len(found) > 1 else ""
            raise BadRecord(where + error.reason) from None
    return found


def _check(messages: Sequence[Message]) -> None:
    """Something to learn, all of it written out."""
    for number, message in enumerate(messages, 1):
        if "{{" in message.content and (found := _PLACEHOLDER.search(message.content)):
            raise BadRecord(f"message {number} holds the placeholder {found[0]}: put a real name there first")
        answers = message.role in ("assistant", "text") and message.weight != 0
        if answers and not message.content.strip() and not message.extra.get("tool_calls"):
            raise BadRecord(f"message {number} ({message.role}) is empty: there is nothing to learn")
    if not any(message.role in ("assistant", "text") for message in messages):
        raise BadRecord("no assistant turn: there is nothing to learn")


def _one(read: Callable[[Value], list[Message]]) -> Callable[[Value], Iterable[Turns]]:
    """The reader of a format whose records are a conversation each, with the functions that may be called in it."""
    return lambda value: [(read(value), tools_of(value))]


_READERS: dict[str, Callable[[Value], Iterable[Turns]]] = {
    "messages": _one(_read_messages),
    "sharegpt": _one(_read_sharegpt),
    "alpaca": _one(_read_alpaca),
    "dolly": _one(_read_dolly),
    "prompt_completion": _one(_read_prompt_completion),
    "question_answer": _one(_read_question_answer),
    "chain_of_thought": _one(_read_chain_of_thought),
    "oasst": read_tree,
    "text": _read_text,
}
