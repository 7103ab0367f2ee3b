"""Conversations through a chat template with provenance: text, and the origin of every character."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jinja2
import numpy as np

from sft_dist.data import provenance
from sft_dist.data.provenance import (
    ARGUMENTS,
    CONTENT,
    HEADER,
    NAMES,
    REASONING,
    ROLE,
    TOOLS,
    WATCH,
    Opaque,
    Run,
    Traced,
    letter,
    trace,
)
from sft_dist.data.render_budget import BUDGET
from sft_dist.errors import BadRecord
from sft_dist.types import Conversation, Message

# What may go wrong inside a template that somebody else wrote: its own refusal, or an operation its data do not fit.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class Rendered:
    """A rendered conversation.

    `text` is the text, `runs` its maximal pieces of one origin, in order, without gaps.
    """

    def __init__(self, text: str) -> None:
        self._traced = text
        self.runs: list[Run] = provenance.runs(text)
        self.text: str = str.__str__(text)

    def with_literal(self, suffix: str) -> Rendered:
        """The same with a literal behind it."""
        return Rendered(provenance.concat([self._traced, provenance.literal(suffix)]))

    @cached_property
    def owners(self) -> np.ndarray:
        """int32[len(text)]: the message each character came from, -1 for the template's own."""
        owners = np.full(len(self.text), -1, dtype=np.int32)
        for run in self.runs:
            owners[run.start : run.end] = run.message
        return owners


def render(
    template: jinja2.Template,
    conversation: Conversation,
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = False,
) -> Rendered:
    """Run `template` over the conversation.

    `special_tokens` are template variables such as `bos_token`. Raises BadRecord when the template refuses the
    conversation (its own `raise_exception`, roles it does not know, a value of the wrong type).
    """
    if len(conversation.messages) > provenance.MAX_MESSAGES:
        raise BadRecord(f"{len(conversation.messages)} messages in one conversation: at most {provenance.MAX_MESSAGES}")
    variables = {
        "tools": trace(conversation.tools, TOOLS) or None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **{name: provenance.literal(token) for name, token in special_tokens.items()},
    }
    BUDGET.start()
    try:
        text = _run(template, conversation, variables)
    except _TEMPLATE_FAILURES as error:
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise BadRecord(f"the chat template refuses the conversation: {kind}{error}") from error
    return Rendered(text)


def render_opaque(
    template: jinja2.Template, conversation: Conversation, special_tokens: Mapping[str, str]
) -> tuple[Traced, list[tuple[int, int, str, str]]] | None:
    """The text with opaque contents, and what the template asked about them; None where it looked at one.

    Only for messages without extras and without tools. See `provenance.Opaque`.
    """
    contents = [
        Opaque(message.content, letter(number, CONTENT) * len(message.content), (number, CONTENT))
        for number, message in enumerate(conversation.messages)
    ]
    messages = [
        {"role": trace(message.role, letter(number, ROLE)), "content": contents[number]}
        for number, message in enumerate(conversation.messages)
    ]
    variables = {
        "tools": None,
        "documents": None,
        "add_generation_prompt": False,
        **{name: provenance.literal(token) for name, token in special_tokens.items()},
    }
    BUDGET.start()
    WATCH.on, WATCH.conditions = True, []
    try:
        text = template.render(messages=messages, **variables)
    except (provenance.Looked, *_TEMPLATE_FAILURES):
        return None
    finally:
        WATCH.on = False
    return (text, WATCH.conditions) if isinstance(text, Traced) else None


def _run(template: jinja2.Template, conversation: Conversation, variables: Mapping[str, Any]) -> str:
    """The rendered text. Arguments of calls are mappings, or JSON text for a template that adds them to text."""
    try:
        return template.render(messages=_traced_messages(conversation), **variables)
    except TypeError:
        if not any("tool_calls" in message.extra for message in conversation.messages):
            raise
        return template.render(messages=_traced_messages(conversation, arguments_as_text=True), **variables)


THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_SLOTS = {
    "content": CONTENT,
    "instruction": CONTENT,
    "input": CONTENT,
    **dict.fromkeys(THOUGHTS, REASONING),
}


def _traced_messages(conversation: Conversation, arguments_as_text: bool = False) -> list[dict[str, Any]]:
    return [_traced_message(message, i, arguments_as_text) for i, message in enumerate(conversation.messages)]


def _traced_message(message: Message, number: int, arguments_as_text: bool) -> dict[str, Any]:
    """The message as the dictionary templates expect, each string owned by its part of message `number`."""
    traced = {
        "role": trace(message.role, letter(number, ROLE)),
        "content": trace(message.content, letter(number, CONTENT)),
    }
    for key, value in message.extra.items():
        if key == "tool_calls":
            traced[key] = [_traced_call(call, number, place, arguments_as_text) for place, call in enumerate(value)]
        else:
            traced[key] = trace(value, letter(number, _SLOTS.get(key, HEADER)))
    return traced


def _traced_call(call: Mapping[str, Any], number: int, place: int, arguments_as_text: bool) -> dict[str, Any]:
    """One function call of message `number`; the called name has a slot of its own."""
    arguments = letter(number, ARGUMENTS)
    traced: dict[str, Any] = trace(call, arguments)
    function = traced["function"]
    function["name"] = trace(function["name"], letter(number, NAMES + place))
    if arguments_as_text:
        function["arguments"] = trace(json.dumps(function["arguments"], ensure_ascii=False), arguments)
    return traced
