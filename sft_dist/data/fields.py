"""Fields of a record: texts that must be there, and the message that asks with an instruction and its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sft_dist.data.strict_json import kind_of
from sft_dist.errors import BadRecord
from sft_dist.types import Message

Value = Mapping[str, Any]
Turns = tuple[list[Message], Sequence[Any]]  # messages, tools


def text_field(value: Value, key: str, *, optional: bool = False) -> str:
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


def task_message(instruction: str, given: str) -> Message:
    """An instruction with its input; templates that tell them apart find both beside the joined content."""
    if not given.strip():
        return Message("user", instruction)
    return Message("user", f"{instruction}\n\n{given}", extra={"instruction": instruction, "input": given})
