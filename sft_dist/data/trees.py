"""Open Assistant message trees: one conversation for each way from the root to a leaf.

    {message_tree_id, prompt: {role: prompter | assistant, text, replies: [...]}}

A way is cut behind its last assistant turn, since nothing is learned from a question without an answer; one without an
assistant turn is left out. Turns that several ways share are in each of them, learned each time: `data.loss_on:
last_turn` learns the ends alone. Source: Koepf et al., 2023, "OpenAssistant Conversations", section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sft_dist.data.fields import Turns, Value, text_field
from sft_dist.errors import BadRecord
from sft_dist.types import Message

_ROLES = {"prompter": "user", "assistant": "assistant"}


def is_tree(value: Value) -> bool:
    """Whether a record is a message with replies under `prompt`."""
    root = value.get("prompt")
    return isinstance(root, Mapping) and "role" in root and "replies" in root


def read_tree(value: Value) -> Iterator[Turns]:
    """The threads of a tree, in the order of its replies."""
    if not is_tree(value):
        raise BadRecord("field 'prompt' must be a message with 'role', 'text' and 'replies'")
    waiting: list[list[Mapping[str, Any]]] = [[value["prompt"]]]
    while waiting:
        way = waiting.pop()
        replies = way[-1].get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
            raise BadRecord("field 'replies' must be a list of messages")
        waiting += [[*way, reply] for reply in reversed(replies)]
        if not replies and (messages := _answered([_message(turn) for turn in way])):
            yield messages, ()


def _message(turn: Mapping[str, Any]) -> Message:
    role = _ROLES.get(str(turn.get("role")))
    if role is None:
        raise BadRecord(
            f"a message of the tree has the unknown role {turn.get('role')!r}: known are {', '.join(_ROLES)}"
        )
    return Message(role, text_field(turn, "text"))


def _answered(messages: list[Message]) -> list[Message]:
    """Up to the last assistant turn."""
    while messages and messages[-1].role != "assistant":
        messages.pop()
    return messages
